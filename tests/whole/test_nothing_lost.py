"""Every command that writes is ended at any moment, runs out of room and meets another: what stood there stands, or the new."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import INPUT, images, listing, small_network
from forked_runs import Ended, Warm, warm
from safetensors.torch import load_file

from convrewrite.folders import scratch
from convrewrite.reporting.report import Report
from convrewrite.results.folder import FILES
from convrewrite.results.reading import read_plan

pytestmark = pytest.mark.slow

WITHOUT_ONNX = (*INPUT, "--calib", "weights", "--no-onnx")
RESULT = set(FILES) - {"model.onnx"}
MOMENTS = [6, pytest.param(200, marks=pytest.mark.soak)]
BEFORE, HOLDS, NOTHING = "what stood in {} before stands", "{} holds the new result, whole", "nothing was written"


@dataclass(frozen=True)
class Ground:
    """A folder with a network, ``out`` for what is written, and ``old`` and ``new``: what each command leaves there."""

    folder: Path
    process: Warm
    old: dict[str, Path]
    new: dict[str, Path]

    @property
    def out(self) -> Path:
        return self.folder / "place" / "out"

    def arguments(self, command: str, out: Path | None = None) -> list[object]:
        """The command that leaves ``new`` in its place; what is recovered is what stands there."""
        if command == "recover":
            data = ["--model", self.folder / "net.pt", "--data", self.folder / "few.pt", "--epochs", "1"]
            return [command, out or self.out, *data, "--no-onnx"]
        plan = [self.new["plan"]] if command == "apply" else []
        rule = [] if command == "apply" else ["--rule", "separable"]
        return [command, self.folder / "net.pt", *plan, "-o", out or self.out, *rule, *WITHOUT_ONNX]

    def reset(self, command: str) -> None:
        """``old`` stands in the place, and nothing beside it."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        (shutil.copyfile if command == "plan" else shutil.copytree)(self.old[command], self.out)

    def stands(self, command: str, out: Path | None = None) -> str:
        """Which of the two stands there; anything else, or a part of it, fails."""
        place = out or self.out
        found = [name for name, of in (("old", self.old), ("new", self.new)) if is_whole(place, of[command])]
        assert len(found) == 1, (found, listing(self.out.parent))
        return found[0]

    def left(self) -> set[str]:
        """What lies beside the results, and what of ours among the temporary files."""
        temporary = {path.name for path in (self.folder / "tmp").iterdir() if scratch.KNOWN.fullmatch(path.name)}
        known = {self.out.name, f"{self.out.name}.recovering"}  # where a training stands is kept on purpose
        return {path.name for path in self.out.parent.iterdir()} - known | temporary


def is_whole(place: Path, expected: Path) -> bool:
    """Whether a plan or a result is this one; times in a result's report differ, and a pickle is loaded."""
    if expected.is_file():
        return place.read_bytes() == expected.read_bytes()
    exact = ("plan.json", "weights.safetensors")
    if listing(place) != RESULT or any((place / name).read_bytes() != (expected / name).read_bytes() for name in exact):
        return False
    weights = load_file(place / "weights.safetensors")
    state = torch.load(place / "model.pt", weights_only=False).state_dict()
    report = Report.model_validate_json((place / "report.json").read_text())
    rewritten = [site.action for site in report.sites] == [
        "kept" if site.option is None else "rewritten" for site in read_plan(place / "plan.json").sites
    ]
    pages = (place / "report.md").read_text().endswith("\n") and "</html>" in (place / "report.html").read_text()
    return (
        rewritten and pages and state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in state)
    )


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    torch.save(small_network(), folder / "net.pt")
    torch.save(images(600), folder / "images.pt")
    torch.save(images(80), folder / "few.pt")
    with warm(folder) as process:
        old = {name: folder / f"old-{name}" for name in ("optimize", "plan")}
        new = {name: folder / f"new-{name}" for name in ("optimize", "apply", "plan", "recover")}
        made = Ground(folder, process, old | dict.fromkeys(("apply", "recover"), old["optimize"]), new)
        for name, out in old.items():
            assert process.run(name, folder / "net.pt", "-o", out, "--rule", "asymmetric", *WITHOUT_ONNX).code == 0
        for name in ("plan", "optimize", "apply"):
            assert process.run(*made.arguments(name, new[name])).code == 0
        shutil.copytree(old["optimize"], new["recover"])
        assert process.run(*made.arguments("recover", new["recover"])).code == 0
        yield made


def moments(ground: Ground, command: str, count: int) -> list[dict[str, float]]:
    """Half of them at calls of the file system, half at any time; and some of the last calls, where all is put in its place."""
    ground.reset(command)
    whole = ground.process.run(*ground.arguments(command))
    assert (whole.code, ground.stands(command)) == (0, "new")
    drawn = random.Random(f"{command}{count}")
    events = [{"event": drawn.randint(1, whole.events)} for _ in range(count // 2)]
    events += [{"event": max(1, whole.events - back)} for back in range(2, 14, 3)]
    return [*events, *({"after": drawn.uniform(0, whole.seconds)} for _ in range(count - count // 2))]


@pytest.mark.parametrize("count", MOMENTS)
@pytest.mark.parametrize("command", ["optimize", "apply", "plan", "recover"])
def test_killed_at_any_moment(ground: Ground, command: str, count: int) -> None:
    stood, left = set(), 0
    for moment in moments(ground, command, count):
        ground.reset(command)
        ended = ground.process.run(*ground.arguments(command), signal=signal.SIGKILL, **moment)
        assert ended.code in (-signal.SIGKILL, 0), ended
        stood.add(ground.stands(command))
        left += bool(ground.left())
        scratch.remove_leftovers(ground.out.parent)
        scratch.remove_leftovers(ground.folder / "tmp")
        assert ground.left() == set(), moment
    assert "old" in stood
    assert left > 0, "none of the moments lay within the work"


@pytest.mark.parametrize("command", ["optimize", "apply", "plan"])
def test_the_next_run_clears_what_a_killed_one_left(ground: Ground, command: str) -> None:
    ground.reset(command)
    events = ground.process.run(*ground.arguments(command)).events
    for event in range(events - 2, 0, -3):  # from the end, where all is made ready, back to where it does not stand yet
        ground.reset(command)
        ground.process.run(*ground.arguments(command), signal=signal.SIGKILL, event=event)
        if ground.left():
            break
    assert ground.left()
    assert ground.process.run(*ground.arguments(command)).code == 0
    assert (ground.stands(command), ground.left()) == ("new", set())


@pytest.mark.parametrize("count", MOMENTS)
@pytest.mark.parametrize(
    "command",
    [
        "optimize",
        pytest.param("apply", marks=pytest.mark.soak),
        pytest.param("plan", marks=pytest.mark.soak),
        "recover",
    ],
)
def test_interrupted_at_any_moment(ground: Ground, command: str, count: int) -> None:
    said = set()
    for number, moment in enumerate(moments(ground, command, count)):
        ground.reset(command)
        sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
        ended = ground.process.run(*ground.arguments(command), signal=sent, **moment)
        said.add(what_it_says(ground, command, ended, sent))
        assert ground.left() == set(), (moment, ended)
    assert "old" in said


def what_it_says(ground: Ground, command: str, ended: Ended, sent: signal.Signals) -> str:
    """That which stands; a signal that came too late, after all was done, changes nothing."""
    stands = ground.stands(command)
    if ended.code in (0, -signal.SIGTERM):
        assert stands == "new" or ended.code != 0
        return stands
    assert ended.code == 128 + sent
    says = ended.message.removeprefix("interrupted; ")
    if says != NOTHING or stands != "old":  # which is said where it came before the command knew of a place
        told, _, state = says.partition("; the state of the training is in out.recovering")
        assert told == (BEFORE if stands == "old" else HOLDS).format(ground.out)
        assert not state or (command == "recover" and stands == "old")
    return stands


@pytest.mark.parametrize("command", ["optimize", "apply", "plan"])
def test_an_interrupt_where_nothing_stood(ground: Ground, command: str) -> None:
    ground.reset(command)
    new = ground.out.parent / "new" / "deep" / "out"
    ended = ground.process.run(*ground.arguments(command, new), signal=signal.SIGINT, event=60)
    assert (ended.code, ended.message) == (130, f"interrupted; {NOTHING}")
    assert ground.left() == set()


def test_an_interrupt_before_the_command_begins(ground: Ground) -> None:
    """As it finds out how much memory it may take."""
    ground.reset("plan")
    for event in range(1, 8):
        ended = ground.process.run(*ground.arguments("plan"), signal=signal.SIGINT, event=event)
        assert (ended.code, ended.message) == (130, f"interrupted; {NOTHING}"), event


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_two_runs_into_one_place_both_end_whole(ground: Ground, times: int) -> None:
    for _ in range(times):
        ground.reset("optimize")
        arguments = [str(argument) for argument in ground.arguments("optimize")]
        other = ["asymmetric" if argument == "separable" else argument for argument in arguments]
        both = ground.process.run_all([{"arguments": arguments}, {"arguments": other}])
        assert [ended.code for ended in both] == [0, 0], both
        assert ground.stands("optimize") in ("old", "new")
        assert ground.left() == set()


# --- no room


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk up to so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(max(0, room.f_bavail * room.f_frsize - free)))


@pytest.mark.parametrize("step", [3 << 14, pytest.param(1 << 12, marks=pytest.mark.soak)])
@pytest.mark.parametrize("command", ["optimize", "apply", "plan"])
def test_a_full_disk_leaves_what_stood(ground: Ground, small_disk: Path, command: str, step: int) -> None:
    said = set()
    out = small_disk / "out"
    for free in range(0, (1 << 15) if command == "plan" else 5 * (3 << 14), step if command != "plan" else step // 4):
        for path in small_disk.iterdir():
            (shutil.rmtree if path.is_dir() else os.unlink)(path)
        (shutil.copyfile if command == "plan" else shutil.copytree)(ground.old[command], out)
        leave(small_disk, free)
        ended = ground.process.run(*ground.arguments(command, out))
        assert {path.name for path in small_disk.iterdir()} == {"out", "filler"}
        assert ground.stands(command, out) == ("new" if ended.code == 0 else "old")
        if ended.code != 0:
            assert ended.code == 2, ended
            assert f"{out}: cannot be written (No space left on device); name another" in ended.message
        said.add(ended.code)
    assert said == {0, 2}


@pytest.mark.parametrize("limit", [0, 2000, 9000, 20000])
@pytest.mark.parametrize("command", ["optimize", "apply", "plan"])
def test_files_may_not_grow_so_long(ground: Ground, command: str, limit: int) -> None:
    """As a quota does it: the file at which it happens is the plan, the pickle, the weights or a report."""
    ground.reset(command)
    ended = ground.process.run(*ground.arguments(command), file_size=limit)
    if ended.code == 0:
        assert ground.stands(command) == "new"
        assert ground.out.is_file() or max(path.stat().st_size for path in ground.out.iterdir()) <= limit
        return
    assert (ended.code, ground.stands(command), ground.left()) == (2, "old", set()), ended
    assert "cannot be written (File too large)" in ended.message


SPILLING = ("--memory", "0.005", "--no-onnx")


@pytest.mark.parametrize(
    ("free", "options"),
    [
        (0, SPILLING),
        (100_000, SPILLING),
        pytest.param(0, (), marks=pytest.mark.soak),
        pytest.param(60_000, (), marks=pytest.mark.soak),
    ],
)
def test_temporary_files_find_no_room(ground: Ground, small_disk: Path, free: int, options: tuple[str, ...]) -> None:
    ground.reset("optimize")
    for path in small_disk.iterdir():
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
    leave(small_disk, free)
    command = ("optimize", ground.folder / "net.pt", "-o", ground.out, "--calib", ground.folder / "images.pt", *options)
    ended = ground.process.run(*command, environment={"TMPDIR": str(small_disk)})
    assert ended.code == 2, ended
    assert ended.message == (
        f"{small_disk}: cannot be written (No space left on device); name another folder for temporary files in TMPDIR"
    )
    assert not [path for path in small_disk.iterdir() if scratch.KNOWN.fullmatch(path.name)]
    assert (ground.stands("optimize"), ground.left()) == ("old", set())


@pytest.mark.parametrize("command", ["optimize", "recover"])
def test_temporary_files_have_no_folder(ground: Ground, command: str) -> None:
    ground.reset(command)
    missing = ground.folder / "missing"
    ended = ground.process.run(*ground.arguments(command), environment={"TMPDIR": str(missing)})
    assert (ended.code, ended.message) == (
        2,
        f"{missing}: cannot be written (No such file or directory); name another folder for temporary files in TMPDIR",
    )
    assert (ground.stands(command), ground.left()) == ("old", set())
    assert not list(ground.out.parent.glob("*.recovering")), "nothing was trained"


def test_a_disk_that_is_read_only(ground: Ground, small_disk: Path) -> None:
    for path in small_disk.iterdir():
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
    for name in ("optimize", "plan"):
        (shutil.copyfile if name == "plan" else shutil.copytree)(ground.old[name], small_disk / name)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        for name in ("optimize", "apply", "plan"):
            out = small_disk / ("plan" if name == "plan" else "optimize")
            ended = ground.process.run(*ground.arguments(name, out))
            assert (ended.code, ground.stands(name, out)) == (2, "old")
            assert f"{out}: cannot be written (" in ended.message
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


# --- the commands that write nothing, and export


@pytest.mark.soak
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_with_onnx_at_any_moment(ground: Ground, sent: signal.Signals) -> None:
    """Export, timing and the cache of timings too: slower, so fewer."""
    command = ["optimize", ground.folder / "net.pt", "-o", ground.out, "--calib", ground.folder / "images.pt"]
    ground.reset("optimize")
    whole = ground.process.run(*command)
    assert whole.code == 0, whole
    drawn = random.Random(0)
    for _ in range(40):
        shutil.rmtree(ground.folder / "cache", ignore_errors=True)
        ground.reset("optimize")
        moment = drawn.choice([{"event": drawn.randint(1, whole.events)}, {"after": drawn.uniform(0, whole.seconds)}])
        ended = ground.process.run(*command, signal=sent, **moment)
        assert "Traceback" not in ended.err, ended.err
        plan = json.loads((ground.out / "plan.json").read_text())
        names = {path.name for path in ground.out.iterdir()}
        assert names == (RESULT if plan["rules"] == ["asymmetric"] else set(FILES))
        for folder in (ground.out.parent, ground.folder / "tmp", ground.folder / "cache" / "timings"):
            if sent == signal.SIGKILL:
                scratch.remove_leftovers(folder)
            assert not [path for path in folder.glob("*") if scratch.KNOWN.fullmatch(path.name)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_writes_nothing_says_so(ground: Ground, sent: signal.Signals) -> None:
    whole = ground.process.run("analyze", ground.folder / "net.pt", *INPUT)
    ended = ground.process.run("analyze", ground.folder / "net.pt", *INPUT, signal=sent, event=whole.events // 2)
    assert (ended.code, ended.message) == (128 + sent, f"interrupted; {NOTHING}")
