"""What a file holds, judging by its first bytes and not by its name."""

from pathlib import Path

from convrewrite.errors import ModelLoadError

HEADER = 9
"""Bytes of a safetensors file up to its first brace, which follows the length of its header."""

TORCH, SAFETENSORS, ONNX = "a file of torch.save", "a safetensors file", "an ONNX file"

SUFFIX = {TORCH: ".pt", SAFETENSORS: ".safetensors", ONNX: ".onnx"}

OPTIMISED = "a model in onnxruntime's own format, which it made for one machine; give the ONNX file that it was made of"

"""What a file is that no command takes, whatever its name."""

FIRST_FIELDS = b"\x12\x1a\x22\x2a\x32\x3a\x42\x72"
"""Tags of the fields that may follow the version of the format, with which an ONNX file begins."""


def require_suffix(path: Path) -> None:
    """Raise ModelLoadError for a file whose content belongs to another suffix. Content of no known kind is left to its reader."""
    expected = SAFETENSORS if path.suffix.lower() == SUFFIX[SAFETENSORS] else TORCH
    if is_optimised(path):
        raise ModelLoadError(f"{path}: expected {expected} by its name, found {OPTIMISED}")
    found = content_of(path)
    if found is not None and found != expected:
        raise ModelLoadError(
            f"{path}: expected {expected} by its name, found {found}; call it {path.stem}{SUFFIX[found]}"
        )


def is_optimised(path: Path) -> bool:
    """Whether it is a file in onnxruntime's own format, as its mark says."""
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ORTM"


def content_of(path: Path) -> str | None:
    """One of the three kinds; None for any other content."""
    with path.open("rb") as file:
        start = file.read(HEADER)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return TORCH
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return SAFETENSORS
    if len(start) == HEADER and start[0] == 8 and 0 < start[1] < 0x80 and start[2] in FIRST_FIELDS:
        return ONNX
    return None
