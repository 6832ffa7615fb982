"""What stands in for numpy's types in a model file: numbers only."""

import re
from typing import Any

import numpy as np


class _StoredDtype:
    """Stands in for ``numpy.dtype`` in a file: numbers only.

    The real one accepts a state that declares any bytes to be object references, which gives a hostile file access to the
    memory of this process.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        del align, copy  # part of the stored call, without meaning for numbers
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code, re.ASCII):
            raise ValueError(f"numpy dtype {code!r} is not a number type")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a numpy dtype with fields or sub-arrays is not a number type")
        self.numpy = self.numpy.newbyteorder(state[1])


class _StoredArray(np.ndarray[Any, np.dtype[Any]]):
    """Stands in for ``numpy.ndarray`` in a file: numbers only; it is pickled as a plain array again."""

    def __new__(cls) -> "_StoredArray":
        return super().__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes):
            raise ValueError("expected an array of numbers")
        stored: Any = (1, shape, dtype.numpy, bool(fortran_order), data)
        super().__setstate__(stored)

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _stored_array(kind: object, shape: object, code: object) -> _StoredArray:
    """Stands in for numpy's ``_reconstruct``: an empty array, which takes its content from the state that follows."""
    del kind, shape, code
    return _StoredArray()


def _stored_scalar(dtype: object, data: object) -> Any:
    """Stands in for numpy's ``scalar``: one number from its bytes."""
    if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes):
        raise ValueError("expected a number")
    return np.frombuffer(data, dtype.numpy)[0]


NUMPY: dict[str, Any] = {
    "numpy.dtype": _StoredDtype,
    "numpy.ndarray": _StoredArray,
    **{f"numpy.{core}.multiarray._reconstruct": _stored_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _stored_scalar for core in ("core", "_core")},
}
"""Names that numpy's pickles ask for -> what they get."""
