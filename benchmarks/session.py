"""A session in a terminal, as text: ``python benchmarks/session.py [--page docs/session.md]``.

Types the commands of a first hour with the trained example into a shell in a terminal of tmux, 80 columns wide, and keeps what
stands there once each is done, as someone who sits before it sees it. A line that is wider would be broken there by the terminal.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

COLUMNS, LINES = 80, 400
"""The terminal: as wide as the narrowest that people use, and long enough for the longest text."""

SECONDS = 900.0
"""How long one command may take; the longest takes two minutes on two quiet cores."""

FACTORY = "--factory model.py:fashion_resnet"

COMMANDS = (
    f"convrewrite analyze fashion.pt {FACTORY} --input 1x1x28x28 --rule balanced",
    f"convrewrite optimize fashion.pt {FACTORY} --calib calibration.npz --rule separable -o out",
    "convrewrite explain out stage3.2.conv2",
    f"convrewrite verify fashion.pt out {FACTORY} --calib calibration.npz --agreement 0.95",
    f"convrewrite bench fashion.pt out {FACTORY}",
    "convrewrite compare out out",
    "convrewrite optimise fashion.pt",
)
"""What is typed, in the folder of the example; the last one is a slip."""

INTRO = """# A session in a terminal

What a first hour with the trained example looks like in a terminal of 80 columns, letter by letter:
`python benchmarks/session.py` types these commands into one (tmux) and keeps what stands there. Progress, a bar for each stage,
stands there as it ended. Other work ran on that machine meanwhile: seconds here say little.
"""


@dataclass(frozen=True)
class Terminal:
    """A shell in a terminal of its own; ``socket`` keeps it from any other tmux of the user."""

    socket: Path

    def tmux(self, *words: str) -> str:
        return subprocess.run(
            ["tmux", "-S", str(self.socket), *words], capture_output=True, text=True, check=True
        ).stdout

    def begin(self, folder: Path) -> None:
        places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        surroundings = {
            "PATH": places, "PS1": "$ ", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "CONVREWRITE_CACHE": str(self.socket.parent / "cache"),
        }  # fmt: skip
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "-c", str(folder),
            "env", *(f"{name}={value}" for name, value in surroundings.items()), "bash", "--norc", "--noprofile",
        )  # fmt: skip

    def run(self, command: str) -> str:
        """What the terminal shows once the command is done, its own line first."""
        done = self.socket.parent / "done"
        self.tmux("send-keys", "-R")
        self.tmux("clear-history")
        self.tmux("send-keys", "-l", f"clear; {command}; touch {done}")
        self.tmux("send-keys", "Enter")
        limit = time.monotonic() + SECONDS
        while not done.exists():
            if time.monotonic() > limit:
                raise SystemExit(f"{command}: expected an end within {SECONDS:g} s, found none")
            time.sleep(0.2)
        done.unlink()
        time.sleep(0.5)  # for the prompt
        screen = [line.rstrip() for line in self.tmux("capture-pane", "-p").splitlines()]
        while screen and screen[-1] in ("", "$"):
            screen.pop()
        return "\n".join([*typed(command), *screen])

    def end(self) -> None:
        self.tmux("kill-server")


def typed(command: str) -> list[str]:
    """The line of a command, broken as one types it where it is long."""
    lines = ["$"]
    for word in command.split():
        if len(lines[-1]) + len(word) + 3 > COLUMNS:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return lines


def recorded() -> list[str]:
    """All commands with what they printed, in a copy of the example."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "fashion"
        folder.mkdir()
        for name in ("fashion.pt", "model.py", "calibration.npz"):
            (folder / name).symlink_to(ROOT / "examples" / "fashion" / name)
        terminal = Terminal(Path(held) / "tmux")
        terminal.begin(folder)
        try:
            return [terminal.run(command) for command in COMMANDS]
        finally:
            terminal.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "session.md")
    arguments = parser.parse_args()
    blocks = [f"```text\n{text}\n```\n" for text in recorded()]
    arguments.page.write_text("\n".join([INTRO, *blocks]), encoding="utf-8")


if __name__ == "__main__":
    main()
