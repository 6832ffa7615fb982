"""Small text files, read whole: only regular ones, and none larger than its kind can be."""

from pathlib import Path

from convrewrite.errors import ConvRewriteError

LARGEST = 64 << 20
"""Most bytes of a plan; the plan of a network of a thousand sites has three million."""


def read_text(path: Path, error: type[ConvRewriteError], expected: str, largest: int = LARGEST) -> str:
    """The text of a UTF-8 file. ``expected`` says what it should be, as ``a rule file in TOML``.

    Raises ``error`` for a file that is missing, not regular (a pipe or a device would never end), too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise error(f"{path}: cannot be read, it is {kind}; expected {expected}")
        with path.open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise error(f"{path}: expected {expected}, at most {largest} bytes, found {path.stat().st_size}")
        return data.decode("utf-8-sig")  # some editors begin a file with a mark of their own
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); expected {expected}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path}: expected {expected}, encoded in UTF-8, found a byte that is not ({cause})") from cause
    except ValueError as cause:
        raise error(f"{path!r}: no name of a file ({cause}); expected {expected}") from cause
