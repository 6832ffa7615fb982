"""What ``from_conv`` starts from: the stage kernels of a structure, from the weights alone or fitted on real inputs."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.escaping import message_of
from convrewrite.fitting import Accumulator, Evidence, Moments, fit
from convrewrite.process import ordinary, ordinary_mode
from convrewrite.structures import Setting, Structure, initial_kernels

ONE_IN_HELD_OUT = 5
"""One in so many examples is held out: it measures the error of the fit and has no part in it."""

FitInputs = Tensor | Iterable[Tensor]
"""Real inputs of a convolution: one batch ``(N, C, H, W)`` or several, which may differ in size."""


def require_structure(owner: str, structure: Structure, spec: ConvSpec) -> None:
    """Raise ValueError if this geometry has no such replacement."""
    if reason := structure.reject(spec.per_group):
        raise ValueError(f"{owner}: {spec.describe()}: {reason}; use another layer")


def require_rank(owner: str, name: str, structure: Structure, spec: ConvSpec, setting: Setting) -> None:
    """Raise ValueError unless the setting's rank is at most the one that is exact already."""
    top = structure.full_rank(spec.per_group, setting)
    if not 1 <= int(setting["rank"]) <= top:
        raise ValueError(
            f"{owner}: {name}: expected 1 to {top}, which reproduces this convolution exactly, found {setting['rank']}"
        )


def replacement(
    owner: str, structure: Structure, conv: nn.Conv2d, setting: Setting, inputs: FitInputs | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Stage kernels and bias, float64, of the replacement of ``conv``; fitted if there are ``inputs``.

    Raises ValueError for inputs the convolution does not take, and for numbers that nothing can be fitted to.
    """
    _require_real(owner, "weight", conv.weight)
    if conv.bias is not None:
        _require_real(owner, "bias", conv.bias)
    with ordinary_mode():
        batches = None if inputs is None else _checked(owner, conv, _listed(owner, inputs))
        try:
            return _found(structure, conv, setting, batches)
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"{owner}: expected weights and inputs of ordinary size, found numbers that nothing can be fitted to "
                f"({message_of(error)}); normalise the inputs as for training, or leave out extreme ones"
            ) from error


def _found(
    structure: Structure, conv: nn.Conv2d, setting: Setting, batches: Sequence[Tensor] | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    spec = ConvSpec.of(conv)
    kernel, *biases = (
        p.double() for p in ordinary(tuple(p.detach() for p in (conv.weight, conv.bias) if p is not None))
    )
    bias = biases[0] if biases else None
    if batches is None:
        return initial_kernels(structure, kernel, spec, setting), bias
    seen, unseen = _split(batches)
    moments, held_out = (_moments(conv, spec, part) for part in (seen, unseen))
    evidence = Evidence.of(spec, kernel.cpu(), moments, held_out, len(batches), (None,) * spec.groups)
    found = fit(structure, spec, setting, evidence.goals(), moments, held_out)
    return found.kernels, None if bias is None else found.bias


def _require_real(owner: str, name: str, numbers: Tensor) -> None:
    if not numbers.is_floating_point():
        raise ValueError(f"{owner}: {name}: expected real floating point numbers, found {numbers.dtype}")
    if not numbers.is_meta and not bool(numbers.isfinite().all()):
        raise ValueError(f"{owner}: {name}: expected finite numbers, found NaN or infinity")


def _listed(owner: str, inputs: FitInputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise ValueError(f"{owner}: inputs: expected a batch or several, found {type(inputs).__name__}")
    return list(inputs)


def _checked(owner: str, conv: nn.Conv2d, batches: Sequence[Tensor]) -> Sequence[Tensor]:
    wanted = f"batches (N, {conv.in_channels}, H, W) of floating point numbers with at least one example"
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise ValueError(f"{owner}: inputs: expected {wanted}, found {type(batch).__name__}")
        if batch.dim() != 4 or batch.shape[1] != conv.in_channels or not batch.is_floating_point():
            raise ValueError(f"{owner}: inputs: expected {wanted}, found {batch.dtype} {tuple(batch.shape)}")
        size = f"{batch.shape[2]}x{batch.shape[3]}"
        if min(ConvSpec.of(conv).output_size((batch.shape[2], batch.shape[3]))) < 1:
            raise ValueError(
                f"{owner}: inputs: expected planes that the kernel {conv.kernel_size} fits in, found {size}"
            )
        if not _can_be_padded(ConvSpec.of(conv), (batch.shape[2], batch.shape[3])):
            raise ValueError(f"{owner}: inputs: expected planes that its padding can be taken from, found {size}")
        _require_real(owner, "inputs", batch)
    if not any(len(batch) for batch in batches):
        raise ValueError(f"{owner}: inputs: expected {wanted}, found none")
    return batches


def _can_be_padded(spec: ConvSpec, size: Size) -> bool:
    """Whether a plane has the pixels that its margins repeat: a reflection leaves out the outermost one."""
    if spec.padding_mode not in ("reflect", "circular"):
        return min(size) > 0
    own = 1 if spec.padding_mode == "reflect" else 0
    return all(max(margins) <= extent - own for margins, extent in zip(spec.padding_pairs(), size, strict=True))


def _split(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Examples to fit on, and held-out ones: every fifth, or the last of fewer. A single example has to serve as both."""
    total = sum(len(batch) for batch in batches)
    if total == 1:
        single = [batch for batch in batches if len(batch)]
        return single, single
    held_out = torch.arange(total) % ONE_IN_HELD_OUT == ONE_IN_HELD_OUT - 1
    held_out[-1] |= total < ONE_IN_HELD_OUT
    parts = list(zip(batches, held_out.split([len(batch) for batch in batches]), strict=True))
    seen = [batch[~chosen.to(batch.device)] for batch, chosen in parts]
    unseen = [batch[chosen.to(batch.device)] for batch, chosen in parts]
    return [part for part in seen if len(part)], [part for part in unseen if len(part)]


def _moments(conv: nn.Conv2d, spec: ConvSpec, batches: Sequence[Tensor]) -> tuple[Moments, ...]:
    sizes = [spec.output_size((batch.shape[2], batch.shape[3])) for batch in batches]
    positions = sum(len(batch) * h * w for batch, (h, w) in zip(batches, sizes, strict=True))
    accumulator = Accumulator(spec, positions, seed=0)
    for x, y in _run(conv, batches):
        accumulator.add(x, y)
    moments = accumulator.result()
    return moments if spec.bias else tuple(part.about_zero() for part in moments)


def _run(conv: nn.Conv2d, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and wanted outputs on the CPU, in a precision that moments can be summed in."""
    exact = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    for batch in batches:
        (x,) = ordinary((batch.detach().to(conv.weight.device, conv.weight.dtype),))
        with torch.no_grad():
            y = conv._conv_forward(x, conv.weight, conv.bias)  # without the caller's hooks, which no layer takes over
        yield x.to("cpu", exact), y.to("cpu", exact)
