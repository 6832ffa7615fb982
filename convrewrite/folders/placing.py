"""Puts something finished in its place in one step, so that at every moment either the earlier or the new is there, whole."""

import ctypes
import errno
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convrewrite.errors import UsageError
from convrewrite.folders.scratch import EARLIER, KNOWN, PLACE, Scratch, remove_leftovers, unwritable, write_errors
from convrewrite.interrupts import held
from convrewrite.machine import permit_alike

TRIES = 5
"""How often putting it there is tried: another process may make or remove the place meanwhile."""

MOVED = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)

CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""The errors of systems, and of file systems, that have no exchange."""

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
"""The system's own numbers: a path is relative to the working folder, and two paths change places (Linux, macOS)."""

RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}
"""Numbers of the system call, by machine, for C libraries that have no function for it."""


def resolved(place: Path) -> Path:
    """Where ``place`` is: links are followed, as they are not to be replaced. Raises UsageError for a link that leads nowhere,
    for a way back out of a folder that is not there, under which nothing could be found later, and for what is no path."""
    if "\0" in str(place):
        raise UsageError(f"{str(place)!r}: cannot be written (no path holds a null byte); name another place")
    if place.is_symlink() and not place.exists():
        raise UsageError(
            f"{place}: is a link to {os.readlink(place)}, which is not there; make that, or remove the link"
        )
    left = [Path(*place.parts[:index]) for index, part in enumerate(place.parts) if part == os.pardir]
    if gone := next((folder for folder in left if not folder.is_dir()), None):
        raise UsageError(
            f"{place}: leads out of {gone} (..), which is no folder; make that, or name the place without it"
        )
    return Path(os.path.realpath(place))


def nearest(place: Path) -> Path:
    """The nearest existing folder above a resolved place: everything is prepared on its file system."""
    return next((parent for parent in place.parents if parent.exists()), place)


def put(made: Path, place: Path, scratch: Scratch) -> None:
    """Put ``made``, a file or a folder in ``scratch``, in ``place``; afterwards what was there before is gone.

    ``scratch`` lies in the folder nearest to ``place``. Missing folders on the way appear with it. Its permissions stay as they
    were. Ctrl-C waits. Raises OSError, and then what was there is there still; UsageError where it could not be put back.
    """
    _write_out(made)
    permit_alike(made, place)
    for attempt in range(TRIES):
        try:
            with held():
                _put(made, place, scratch)
            break
        except OSError as error:
            if error.errno not in MOVED or attempt == TRIES - 1 or not made.exists():
                raise
    with suppress(OSError):  # it is there; whether that survives a loss of power is up to the file system
        _sync(nearest(place))


def exchange(first: Path, second: Path) -> None:
    """Two paths change places in one step of the file system. Raises OSError, with an errno of CANNOT_EXCHANGE where there is no
    such step."""
    library = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        answer = library.renamex_np(a, b, RENAME_SWAP)
    elif hasattr(library, "renameat2"):
        answer = library.renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE)
    elif sys.platform == "linux" and platform.machine() in RENAMEAT2:
        answer = library.syscall(RENAMEAT2[platform.machine()], AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if answer != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


def _put(made: Path, place: Path, scratch: Scratch) -> None:
    if not made.is_dir() and place.parent.is_dir():
        os.replace(made, place)
    elif not os.path.lexists(place):
        _put_new(made, place, scratch)
    elif not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    else:
        try:
            exchange(made, place)
        except OSError as error:
            if error.errno not in CANNOT_EXCHANGE:
                raise
            _put_in_two_steps(made, place, scratch)


def _put_new(made: Path, place: Path, scratch: Scratch) -> None:
    """Put it there together with the missing folders above it, in one step."""
    parent = nearest(place)
    names = place.relative_to(parent).parts
    if len(names) == 1:
        os.rename(made, place)
        return
    chain = scratch.path.joinpath("above", *names)
    chain.parent.mkdir(parents=True, exist_ok=True)
    os.rename(made, chain)
    try:
        os.rename(scratch.path / "above" / names[0], parent / names[0])
    except OSError:
        os.rename(chain, made)
        raise


def _put_in_two_steps(made: Path, place: Path, scratch: Scratch) -> None:
    """Without an exchange: what was there is put back if the second step fails, in the next run if this one is killed."""
    earlier = scratch.path / EARLIER
    (scratch.path / PLACE).write_bytes(os.fsencode(place.name))
    try:
        os.rename(place, earlier)
        os.rename(made, place)
    except BaseException as error:
        if os.path.lexists(earlier) and not os.path.lexists(place):
            _put_back(earlier, place, scratch, error)
        raise


def _put_back(earlier: Path, place: Path, scratch: Scratch, error: BaseException) -> None:
    try:
        os.rename(earlier, place)
    except BaseException:
        scratch.keep()
        raise UsageError(
            f"{place}: could not be replaced ({error}), nor be put back; what stood there lies whole in {earlier}, and the "
            "next run into this place puts it back"
        ) from error


def _write_out(made: Path) -> None:
    """See that everything is on the disk before it replaces what is there."""
    files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
    for file in files:
        _sync(file)
    if made.is_dir():
        with suppress(OSError):  # not every file system syncs folders
            _sync(made)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def made_aside(path: Path, other: str = "another place") -> Iterator[Path]:
    """A path in a scratch folder, for a file or a folder; what is made there takes the place of ``path`` in one step.

    Links in ``path`` are followed. If the block raises, what was in the place is there still. Raises UsageError that
    says to name ``other`` where the place cannot be written.
    """
    with write_errors(path, other):
        place = resolved(path)
        with Scratch(nearest(place)) as scratch:
            made = scratch.path / "made"
            yield made
            put(made, place, scratch)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_idle(folder: Path, place: Path) -> None:
    """Raise UsageError for a ``folder``, resolved to ``place``, in which another process has a scratch folder; those of processes
    that have ended are cleared first."""
    remove_leftovers(place)
    if place.is_dir() and any(KNOWN.fullmatch(name) for name in os.listdir(place)):
        raise UsageError(
            f"{folder}: another run writes in it; wait until that has ended, or name another folder with -o"
        )


def require_replaceable(folder: Path, place: Path, other: str = "another place") -> None:
    """Raise UsageError for a ``folder``, resolved to ``place``, that cannot be replaced by another."""
    if os.path.ismount(place) or place.samefile(os.curdir):
        raise UsageError(f"{folder}: a folder that is mounted, or worked in, cannot be replaced; name one inside it")
    if not os.access(place, os.W_OK):
        raise unwritable(folder, os.strerror(errno.EACCES), other)


def require_room_beside(place: Path) -> None:
    """Raise OSError unless something can be made where ``place`` is to be."""
    with Scratch(nearest(place)):
        pass


def write_new(path: Path, text: str) -> None:
    """Write a new text file, aside and in one step. Raises UsageError where something is there already, or where writing
    fails."""
    with write_errors(path, "another file"):
        if resolved(path).exists():
            raise UsageError(f"{path}: expected a new file, found that there is one; name another, or remove it")
    with made_aside(path, "another file") as made:
        made.write_text(text, encoding="utf-8")
