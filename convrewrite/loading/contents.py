"""Whether a file holds what its name promises."""

from pathlib import Path

from convrewrite.contents import ONNX, OPTIMISED, PICKLE, SAFETENSORS, ZIP, content_of
from convrewrite.errors import ModelLoadError

TORCH = "a file of torch.save"

KINDS = {ZIP: TORCH, PICKLE: TORCH, SAFETENSORS: SAFETENSORS, ONNX: ONNX}

SUFFIX = {TORCH: ".pt", SAFETENSORS: ".safetensors", ONNX: ".onnx"}


def require_suffix(path: Path) -> None:
    """Raise ModelLoadError for a file whose content belongs to another suffix. Content of no known kind is left to its reader."""
    expected = SAFETENSORS if path.suffix.lower() == SUFFIX[SAFETENSORS] else TORCH
    content = content_of(path)
    if content == OPTIMISED:
        raise ModelLoadError(f"{path}: expected {expected} by its name, found {OPTIMISED}")
    found = expected if content is None else KINDS[content]
    if found != expected:
        raise ModelLoadError(
            f"{path}: expected {expected} by its name, found {found}; call it {path.stem}{SUFFIX[found]}"
        )
