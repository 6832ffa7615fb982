"""The geometry of functional convolutions, whichever function is called and however its arguments are given."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import SPECS
from torch.nn import functional as F

from convrewrite.conv import ConvSpec
from convrewrite.graph.calls import ARGUMENTS, geometry_of_call, named_arguments

aten = torch.ops.aten
WEIGHT, BIAS = torch.randn(6, 2, 3, 3), torch.randn(6)
SPEC = ConvSpec(4, 6, (3, 3), stride=(2, 2), padding=(1, 0), groups=2)
X = torch.randn(1, 4, 7, 7)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (F.conv2d, (X, WEIGHT, BIAS, 2, (1, 0), 1, 2), {}),
        (F.conv2d, (X, WEIGHT, BIAS, np.int64(2), (1, 0), np.int64(1), 2), {}),
        (torch.conv2d, (X, WEIGHT), {"bias": BIAS, "stride": [2], "padding": [1, 0], "groups": 2}),
        (aten.conv2d, (X, WEIGHT, BIAS, [2, 2], [1, 0], [1, 1], 2), {}),
        (aten.conv2d.default, (X, WEIGHT, BIAS, [2, 2], [1, 0], [1, 1], 2), {}),
        (aten.convolution, (X, WEIGHT, BIAS, [2, 2], [1, 0], [1, 1], False, [0, 0], 2), {}),
        (torch.convolution, (X, WEIGHT, BIAS, [2, 2], [1, 0], [1, 1], False, [0, 0], 2), {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_function_gives_the_same_geometry(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    spec = geometry_of_call(named_arguments(function, args, kwargs))
    assert spec == SPEC
    assert spec.output_size((7, 7)) == function(*args, **kwargs).shape[-2:]


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.padding_mode == "zeros"], ids=ConvSpec.describe)
def test_geometries_come_back(spec: ConvSpec) -> None:
    weight, bias = torch.zeros(spec.weight_shape), torch.zeros(spec.out_channels) if spec.bias else None
    x = torch.zeros(1, spec.in_channels, 9, 9)
    if spec.transposed:
        args = (x, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
        assert geometry_of_call(named_arguments(F.conv_transpose2d, args, {})) == spec
    else:
        args = (x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        assert geometry_of_call(named_arguments(F.conv2d, args, {})) == spec


def test_a_word_for_padding_stays_one() -> None:
    named = named_arguments(aten.conv2d.padding, (X, WEIGHT, None, [1, 1], "same", [1, 1], 2), {})
    assert geometry_of_call(named).padding == "same"


def test_the_functions_take_their_arguments_in_this_order() -> None:
    for function, names in ARGUMENTS.items():
        schema = getattr(function, "_schema", None)
        if schema is not None:
            assert tuple(argument.name for argument in schema.arguments) == names


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        (F.conv1d, ConvSpec(4, 6, (1, 3), (1, 2), (0, 1), (1, 2), 2, dims=1)),
        (F.conv_transpose1d, ConvSpec(4, 6, (1, 3), (1, 2), (0, 1), groups=2, transposed=True, dims=1)),
    ],
)
def test_one_dimension(function: Any, spec: ConvSpec) -> None:
    weight, x = torch.zeros(spec.weight_shape), torch.zeros(1, 4, 9)
    named = {"bias": torch.zeros(6), "stride": 2, "padding": [1], "groups": 2}
    named |= {} if spec.transposed else {"dilation": (2,)}
    assert geometry_of_call(named_arguments(function, (x, weight), named)) == spec
    assert spec.output_size((1, 9)) == (1, function(x, weight, **named).shape[-1])
