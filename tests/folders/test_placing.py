"""What takes a place is there whole, or what stood there is, whatever fails on the way, and at whichever call."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import listing

from convrewrite.errors import UsageError
from convrewrite.folders import placing
from convrewrite.folders.placing import nearest, put, resolved
from convrewrite.folders.scratch import Scratch


def made_in(scratch: Scratch, text: str = "new") -> Path:
    made = scratch.path / "result"
    made.mkdir()
    (made / "file").write_text(text)
    return made


@pytest.fixture(params=["exchange", "two steps"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An earlier result, on a file system with an exchange and on one without."""
    if request.param == "two steps":
        monkeypatch.setattr(placing, "exchange", raising(OSError(errno.EINVAL, "Invalid argument")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    return tmp_path / "out"


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_args: object, **_named: object) -> None:
        raise error

    return fail


def test_the_new_takes_the_place_of_the_old(out: Path) -> None:
    with Scratch(out.parent) as scratch:
        put(made_in(scratch), out, scratch)
        assert (out / "file").read_text() == "new"
    assert listing(out.parent) == {"out", "out/file"}


@pytest.mark.parametrize("mode", [0o700, 0o770])
def test_who_may_read_a_place_stays_as_it_was(out: Path, mode: int) -> None:
    (out.parent / "plan").touch()
    for place in (out, out.parent / "plan"):
        place.chmod(mode)
    with Scratch(out.parent) as scratch:
        put(made_in(scratch), out, scratch)
        (scratch.path / "made").write_text("new")
        put(scratch.path / "made", out.parent / "plan", scratch)
    assert [place.stat().st_mode & 0o777 for place in (out, out.parent / "plan")] == [mode, mode]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("call", ["rename", "fsync", "open", "exchange"])
@pytest.mark.parametrize("done", [False, True], ids=["instead", "afterwards"])
def test_a_call_that_fails_loses_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str, done: bool
) -> None:
    """At its first time, its second and so on, until none is left to fail."""
    owner = placing if call == "exchange" else os
    real = getattr(owner, call)
    for failing in range(1, 20):
        (out / "file").write_text("old")
        calls = 0

        def failed(*args: object, failing: int = failing, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls != failing:
                return real(*args, **named)
            answer = real(*args, **named) if done else None
            if call == "open" and answer is not None:
                os.close(answer)
            raise error

        with Scratch(out.parent) as scratch:
            made = made_in(scratch)
            monkeypatch.setattr(owner, call, failed)
            try:
                put(made, out, scratch)
            except type(error):
                pass
            finally:
                monkeypatch.setattr(owner, call, real)
        assert (out / "file").read_text() in ("old", "new")
        assert listing(out.parent) == {"out", "out/file"}
        if calls < failing:
            return
    raise AssertionError("it never came to an end")


def test_what_cannot_be_put_back_is_told_and_put_back_by_the_next_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(placing, "exchange", raising(OSError(errno.ENOSYS, "Function not implemented")))
    real, calls = os.rename, 0

    def only_once(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch, Scratch(out.parent) as scratch:
        patch.setattr(os, "rename", only_once)
        with pytest.raises(UsageError, match=r"out: could not be replaced .* what stood there lies whole in .*earlier"):
            put(made_in(scratch), out, scratch)
    assert (scratch.path / "earlier" / "file").read_text() == "old"
    with Scratch(out.parent):
        assert (out / "file").read_text() == "old"
    assert listing(tmp_path) == {"out", "out/file"}


def test_missing_folders_appear_with_what_is_in_them(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "out"
    assert nearest(place) == tmp_path
    with Scratch(tmp_path) as scratch:
        put(made_in(scratch), place, scratch)
    assert listing(tmp_path) == {"a", "a/b", "a/b/out", "a/b/out/file"}


@pytest.mark.parametrize("meanwhile", ["a", "a/b", "a/b/out"])
def test_a_folder_that_another_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str) -> None:
    place, real = tmp_path / "a" / "b" / "out", nearest

    def late(path: Path) -> Path:
        found = real(path)
        if not (tmp_path / "a").exists():
            (tmp_path / meanwhile).mkdir(parents=True)
            (tmp_path / "a" / "other").write_text("")
        return found

    with Scratch(tmp_path) as scratch:
        made = made_in(scratch)
        monkeypatch.setattr(placing, "nearest", late)
        put(made, place, scratch)
    assert listing(tmp_path) == {"a", "a/other", "a/b", "a/b/out", "a/b/out/file"}


def test_a_file_never_gives_way_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with Scratch(tmp_path) as scratch, pytest.raises(NotADirectoryError):
        put(made_in(scratch), tmp_path / "out", scratch)
    assert (tmp_path / "out").read_text() == "mine"


def test_files_are_replaced_and_made(tmp_path: Path) -> None:
    for place, text in ((tmp_path / "plan", "1"), (tmp_path / "plan", "2"), (tmp_path / "deep" / "er" / "plan", "3")):
        with Scratch(tmp_path) as scratch:
            (scratch.path / "made").write_text(text)
            put(scratch.path / "made", place, scratch)
        assert place.read_text() == text
    assert listing(tmp_path) == {"plan", "deep", "deep/er", "deep/er/plan"}


def test_links_are_followed_and_those_that_lead_nowhere_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "broken").symlink_to("nothing")
    assert resolved(tmp_path / "link") == tmp_path / "real"
    with pytest.raises(UsageError, match="broken: is a link to nothing, which is not there"):
        resolved(tmp_path / "broken")
    assert resolved(tmp_path / "link" / ".." / "new") == tmp_path / "new"
    with pytest.raises(UsageError, match=r"gone \(\.\.\), which is no folder"):
        resolved(tmp_path / "gone" / ".." / "new")


def test_the_system_call_itself_where_the_library_has_no_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        """A C library from before renameat2."""

        def __init__(self, *_args: object, **_named: object) -> None:
            self.syscall = real(None, use_errno=True).syscall

    real = placing.ctypes.CDLL
    if placing.sys.platform != "linux" or placing.platform.machine() not in placing.RENAMEAT2:
        pytest.skip("no such system call here")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.setattr(placing.ctypes, "CDLL", Old)
    placing.exchange(tmp_path / "a", tmp_path / "b")
    assert listing(tmp_path) == {"a", "a/b", "b", "b/a"}
    with pytest.raises(FileNotFoundError):
        placing.exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is UTF-8")
def test_a_place_whose_name_is_no_utf_8_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "exchange", raising(OSError(errno.ENOSYS, "Function not implemented")))
    out = tmp_path / os.fsdecode(b"r\xff")
    out.mkdir()
    with Scratch(tmp_path) as scratch:
        put(made_in(scratch), out, scratch)
        assert (out / "file").read_text() == "new"
