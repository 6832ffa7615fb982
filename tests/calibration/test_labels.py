"""Labels in any form that numpy and torch save; what is none is refused in our words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convrewrite.calibration import read_calibration, read_labels
from convrewrite.errors import CalibrationError

MEMORY = 1 << 20


@pytest.mark.parametrize("order", ["<i8", ">i8", ">i2", "|u1"])
def test_labels_of_any_byte_order(tmp_path: Path, order: str) -> None:
    values = np.arange(5, dtype=order)
    np.save(tmp_path / "y.npy", values)
    np.savez(tmp_path / "y.npz", labels=values)
    torch.save({"labels": list(range(5))}, tmp_path / "y.pt")
    for name in ("y.npy", "y.npz", "y.pt"):
        assert torch.equal(read_labels(tmp_path / name, MEMORY), torch.arange(5)), name


@pytest.mark.parametrize("values", [["a", "b"], [1, [2]], [None]])
def test_what_is_no_row_of_numbers_is_refused(tmp_path: Path, values: object) -> None:
    torch.save(values, tmp_path / "y.pt")
    with pytest.raises(CalibrationError, match=r"y\.pt: expected labels, but reading it raised"):
        read_labels(tmp_path / "y.pt", MEMORY)


def test_a_header_that_cannot_be_read_is_not_quoted_whole(tmp_path: Path) -> None:
    header = b"{'descr':" + b"(" * 4000 + b"'<i8'" + b")" * 4000 + b",'fortran_order':False,'shape':(8,),}\n"
    (tmp_path / "y.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CalibrationError, match=r"y\.npy: expected labels") as of_labels:
        read_labels(tmp_path / "y.npy", MEMORY)
    with pytest.raises(CalibrationError, match=r"y\.npy: expected a NumPy array, but it cannot be read") as of_inputs:
        read_calibration(str(tmp_path / "y.npy"), torch.zeros(1, 8))
    assert max(len(str(refused.value)) for refused in (of_labels, of_inputs)) < 500


@pytest.mark.parametrize("dtype", [np.longdouble, np.float32])
def test_other_numbers_than_whole_ones_are_refused(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "y.npy", np.arange(5, dtype=dtype))
    with pytest.raises(CalibrationError, match=r"y\.npy: expected "):
        read_labels(tmp_path / "y.npy", MEMORY)


def test_a_single_number_is_no_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "y.npz", labels=np.int64(3))
    with pytest.raises(
        CalibrationError, match=r"expected one whole number for each input, \(N,\), found torch.int64 \(\)"
    ):
        read_labels(tmp_path / "y.npz", MEMORY)
