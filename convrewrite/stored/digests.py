"""What tensors hold, as bytes and as hashes, wherever they lie and however they are laid out."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """The numbers of a tensor, byte by byte in the order of its indices: indices and values of a sparse one, the numbers that a
    quantised one stands for; nothing where there are no numbers, as on the device ``meta``."""
    plain = tensor.detach()
    if plain.is_meta or plain.numel() == 0:
        return b""
    if plain.layout is not torch.strided:
        sparse = plain.to_sparse_coo().coalesce()
        return b"".join(bytes(raw_bytes(part)) for part in (sparse.indices(), sparse.values()))
    if plain.is_quantized:
        plain = plain.dequantize()
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if plain.stride() != (1,):  # of a single number, which counts as contiguous whatever its stride
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8).numpy().data


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors with their names, dtypes, shapes and order in memory, on which rounding may depend."""
    found = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(tensors.items()):
        order = tensor.stride() if tensor.layout is torch.strided else tensor.layout
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {order}\n".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()
