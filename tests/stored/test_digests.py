"""Bytes and hashes of tensors in any layout."""

import warnings

import pytest
import torch
from torch import Tensor

from convrewrite.stored.digests import raw_bytes, tensors_digest

SAMPLES = {
    "one number of a column": torch.arange(6.0).reshape(2, 3)[:1, 1],
    "expanded": torch.ones(1).expand(4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative view": torch.tensor([1 + 2j]).conj().imag,
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "booleans": torch.tensor([True, False]),
    "scalar": torch.tensor(3),
    "nothing": torch.ones(0, 3),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_are_those_of_the_numbers_in_their_order(name: str) -> None:
    tensor = SAMPLES[name]
    plain = torch.tensor(tensor.tolist(), dtype=tensor.dtype).reshape(tensor.shape)
    assert bytes(raw_bytes(tensor)) == plain.flatten().view(torch.uint8).numpy().tobytes()
    assert len(tensors_digest({"x": tensor})) == 40


def quantised(scale: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them; models that hold some are still there
        return torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.qint8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.eye(3).to_sparse(), torch.eye(3).flip(0).to_sparse()),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        (quantised(0.1), quantised(0.3)),
    ],
    ids=["where the numbers are", "which they are", "what they stand for"],
)
def test_others_have_another_hash(one: Tensor, other: Tensor) -> None:
    assert tensors_digest({"x": one}) == tensors_digest({"x": one.clone()}) != tensors_digest({"x": other})


def test_a_tensor_without_numbers_has_no_bytes() -> None:
    assert raw_bytes(torch.ones(3, device="meta")) == b""
