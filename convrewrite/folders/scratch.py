"""Temporary folders that are cleared sooner or later, however their process ends.

Every one has a name by which it is recognised and a file that its process holds locked. The lock ends with the process, however
that ends; whoever makes the next folder in the same place clears those that nobody holds.
"""

import atexit
import errno
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convrewrite.errors import ConvRewriteError, UsageError
from convrewrite.escaping import led_to, message_of
from convrewrite.interrupts import held, soon
from convrewrite.machine import is_ours

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, so nothing of other processes is cleared either
    fcntl = None  # type: ignore[assignment]


NAME = "convrewrite-run-"

KNOWN = re.compile(rf"\.?{NAME}[a-z0-9_]{{8}}")
"""The names of scratch folders: hidden beside results, visible among temporary files."""

LOCK = "lock"

EARLIER, PLACE = "earlier", "place"
"""Names of what is out of its place while a folder is replaced in two steps, and of the file that names the place."""

LONGEST_NAME = 4096
"""Most bytes of the name of a place, Linux's own limit of a path."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk that is full or lets nothing be written."""

PROBE = 1 << 20
"""Bytes that are written to find out why a file could not be written; more than writers buffer."""

VARIABLES = ("TMPDIR", "TEMP", "TMP")


class _Entry(weakref.ref["Scratch"]):
    """What is needed to clear a folder whose object is gone."""

    path: Path
    lock: int
    process: int


_uncleared: dict[int, _Entry] = {}
"""The folders of this process that are not cleared yet."""

_later = False
"""Whether folders whose objects are garbage-collected are cleared only when another is made or closed, or the process ends."""


@contextmanager
def cleared_later() -> Iterator[None]:
    """Inside the block none of our code runs while an object is garbage-collected: an interrupt there would be lost, and the
    folder left. Folders whose objects were collected are cleared at the end."""
    global _later
    before, _later = _later, True
    try:
        yield
    finally:
        _later = before
        with held():
            _clear_collected()


class Scratch:
    """A folder that lasts as long as this object, or until it is closed. Raises OSError where it cannot be made.

    ``parent`` None: among the temporary files. What processes that have ended left in the same parent is cleared first, unless
    ``swept``.
    """

    def __init__(self, parent: Path | None = None, *, swept: bool = False) -> None:
        hidden = "" if parent is None else "."
        folder = temporary_folder() if parent is None else parent.absolute()
        if not swept:
            remove_leftovers(folder)
        with held():
            _clear_collected()
            self.path, lock = _claimed_new(folder, hidden + NAME)
            self._entry = _Entry(self, None if _later else _clear_now)
            self._entry.path, self._entry.lock, self._entry.process = self.path, lock, os.getpid()
            _uncleared[id(self._entry)] = self._entry

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder. Ctrl-C waits until that is done."""
        with held():
            _clear_collected()
            if _uncleared.pop(id(self._entry), None) is not None:
                _clear_own(self._entry)

    def keep(self) -> None:
        """Leave the folder to the next run in this place, since it holds what could not be put back."""
        if _uncleared.pop(id(self._entry), None) is not None:
            os.close(self._entry.lock)


def temporary_folder() -> Path:
    """Where temporary files go: what ``TMPDIR`` names, whether it exists or not, otherwise the system's own choice; its first one
    where it finds none that can be written."""
    named = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    try:
        return Path(named or tempfile.gettempdir()).absolute()
    except FileNotFoundError:
        return Path(os.sep, "tmp")


def temporary() -> Scratch:
    """A scratch folder among the temporary files. Raises UsageError that names the folder."""
    with write_errors():
        return Scratch()


@contextmanager
def write_errors(path: Path | None = None, other: str = "another place") -> Iterator[None]:
    """Turn a file system's refusal to write ``path``, or temporary files, into a UsageError that says to name ``other``."""
    try:
        yield
    except ConvRewriteError:
        raise
    except Exception as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else disk_full(error)
        if reason is None:
            raise
        raise unwritable(path, reason, other) from error


def unwritable(path: Path | None, reason: str, other: str = "another place") -> UsageError:
    """The error for a place that cannot be written; None: the temporary files. What lies in a scratch folder is gone by the time
    this is read: the folder that holds it is named."""
    scratch = None if path is None else next((one for one in reversed(path.parents) if KNOWN.fullmatch(one.name)), None)
    if path is not None and scratch is not None and scratch.name.startswith("."):
        path = scratch.parent
    elif path is None or scratch is not None:
        path, other = temporary_folder(), "another folder for temporary files in TMPDIR"
    return UsageError(f"{path}: cannot be written ({reason}); name {other}")


def disk_full(error: BaseException | None, tried: Path | None = None) -> str | None:
    """What the disk says, where an error anywhere in a chain is one of :data:`FULL`; also where none is, but nothing can be
    written beside ``tried``: torch imports parts of itself late, and what these run into without room says nothing of it."""
    for one in led_to(error):
        quoted = re.search(r"\(os error (\d+)\)", message_of(one))  # so the libraries written in Rust say it
        number = one.errno if isinstance(one, OSError) else int(quoted[1]) if quoted else None
        if number in FULL:
            return os.strerror(number)
    if tried is None:
        return None
    probe = tried.with_name(f"{tried.name}.room")
    try:
        require_room(probe)
        probe.unlink()
    except OSError as full:
        return disk_full(full)
    return None


def require_room(path: Path) -> None:
    """Raise the disk's own OSError if no more can be written to a file: torch, which failed to, does not say why."""
    with path.open("ab") as file:
        file.write(bytes(PROBE))


def remove_leftovers(parent: Path) -> None:
    """Clear the scratch folders in ``parent`` whose processes have ended. Other users' are left alone, and so is what cannot be
    removed."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if (
                KNOWN.fullmatch(entry.name)
                and entry.is_dir(follow_symlinks=False)
                and is_ours(entry.stat(follow_symlinks=False))
            ):
                # What lies in one may come from anyone, as a name that no path can have.
                with suppress(OSError, ValueError):
                    _sweep_one(Path(entry.path))


def _sweep_one(folder: Path) -> None:
    if not (folder / LOCK).exists():
        folder.rmdir()  # its process ended while making or clearing it: it is empty, or no scratch folder
        return
    lock = _claim(folder)
    if lock is None:
        return
    try:
        _put_earlier_back(folder)
        _clear(folder)
    finally:
        os.close(lock)


def _put_earlier_back(folder: Path) -> None:
    """Put back what a process took away that was killed between the two steps of a replacement, if nothing is there since."""
    if (folder / EARLIER).exists() and (folder / PLACE).is_file():  # to read a pipe would never end
        with (folder / PLACE).open("rb") as file:
            place = folder.parent / Path(os.fsdecode(file.read(LONGEST_NAME))).name
        if not os.path.lexists(place):
            os.rename(folder / EARLIER, place)


def _claimed_new(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and its lock; one that another process swept before it was locked is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            lock = _claim(folder, new=True)
        except FileNotFoundError:
            continue
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if lock is not None:
            return folder, lock


def _claim(folder: Path, *, new: bool = False) -> int | None:
    """The lock of a folder, held until it is closed; None where another process has it, or where nothing can be locked."""
    lock = os.open(folder / LOCK, os.O_RDWR | (os.O_CREAT if new else 0), 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (fcntl is not None or new) and os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
            return lock
    except BlockingIOError:
        pass
    except OSError as error:
        if new and error.errno != errno.ENOENT:  # a file system without locks: nobody can claim this one later, either
            return lock
    os.close(lock)
    return None


def _clear_now(_gone: weakref.ref["Scratch"]) -> None:
    if not _uncleared:  # as when the process ends: all is cleared, and little of what is called here may be left
        return
    with held(deliver=soon):
        _clear_collected()


def _clear_collected() -> None:
    for key, one in list(_uncleared.items()):
        if one() is None and _uncleared.pop(key, None) is not None:
            _clear_own(one)


@atexit.register
def _clear_at_exit() -> None:
    with held():
        while _uncleared:
            _clear_own(_uncleared.popitem()[1])


def _clear_own(one: _Entry) -> None:
    if os.getpid() != one.process:  # a fork has the same object, but the folder is its parent's
        return
    try:
        _clear(one.path)
    finally:
        os.close(one.lock)


def _clear(folder: Path) -> None:
    """Remove a claimed folder, the lock last: if that is cut short, what is left can be found again."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != LOCK and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
