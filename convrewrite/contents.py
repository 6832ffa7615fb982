"""What a file is, judging by its first bytes and not by its name."""

from pathlib import Path

ZIP = "a zip archive, as torch.save writes"
PICKLE = "a pickle, as older versions of torch.save write"
SAFETENSORS = "a safetensors file"
ONNX = "an ONNX file"
OPTIMISED = "a model in onnxruntime's own format, which it made for one machine; give the ONNX file that it was made of"
"""What no command takes, whatever its name."""

_HEADER = 9
"""Bytes of a safetensors file up to its first brace, which follows the length of its header."""

_PROTOCOLS = range(2, 6)
"""Versions of Python's pickles that begin with a mark and their number."""

_FIRST_FIELDS = b"\x12\x1a\x22\x2a\x32\x3a\x42\x72"
"""Tags of the fields that may follow the version of the format, with which an ONNX file begins."""


def content_of(path: Path) -> str | None:
    """One of the five kinds; None for any other content."""
    with path.open("rb") as file:
        start = file.read(_HEADER)
    if start[4:8] == b"ORTM":
        return OPTIMISED
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return SAFETENSORS  # before a pickle, whose mark is also the length of a header, as of 640 bytes
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if len(start) > 1 and start[0] == 0x80 and start[1] in _PROTOCOLS:
        return PICKLE
    if len(start) == _HEADER and start[0] == 8 and 0 < start[1] < 0x80 and start[2] in _FIRST_FIELDS:
        return ONNX
    return None
