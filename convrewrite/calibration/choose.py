"""Which inputs a run is fitted to and evaluated on, and the memory layout in which they run fastest.

Real inputs where the caller gives any, otherwise images made from the model itself, otherwise none: then the factors are those of
the weights alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from convrewrite.calibration.batches import Calibration, held_out_of, read_calibration
from convrewrite.calibration.synthetic import synthesise
from convrewrite.errors import CalibrationError
from convrewrite.inputs import Inputs, in_batches_of, in_whole_batches, parameter_names, shapes_of
from convrewrite.loading import import_object
from convrewrite.meanings import Evaluation
from convrewrite.places import out_of_memory
from convrewrite.progress import Progress, silent
from convrewrite.settings import MEMORY
from convrewrite.values import counted, shape_text

NOISE_EXAMPLES = 64
"""Random inputs that results are evaluated on where there are no others."""

TRIED = 2
"""Examples that another memory layout is tried on, for a model that takes any number."""


def calibrate(
    model: nn.Module,
    inputs: Inputs,
    source: object,
    *,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Progress | None = None,
    batch: int | None = None,
    graph_inputs: Sequence[str] = (),
) -> Calibration:
    """Real inputs of at most ``memory`` bytes where there are any, otherwise synthesised ones, otherwise none, with a loud note.

    ``batch``: how many examples the model takes at a time, where that is not any number; an incomplete batch is left out.
    ``graph_inputs``: names of all inputs of the ONNX graph that the model was made of. A Calibration may hold all of them, even
    if the model does not take all. Raises CalibrationError for a Calibration with another number of inputs or an empty batch, and
    for fewer examples than ``batch``.
    """
    if isinstance(source, Calibration):
        source = checked_calibration(source, model, len(inputs), graph_inputs)
    found = _calibration(model, inputs, source, seed=seed, memory=memory, progress=progress, synthetic=batch is None)
    return found if batch is None else _in_whole_batches(found, batch)


def checked_calibration(source: Calibration, model: nn.Module, count: int, graph_inputs: Sequence[str]) -> Calibration:
    """A caller's own Calibration, with the ``count`` inputs alone that the model takes. Raises CalibrationError for one with
    another number of inputs, and for batches without an example, which nothing can be fitted to or measured on."""
    found = _without_held(source, parameter_names(model)[:count], graph_inputs, count)
    for name, batches in (("fit", found.fit), ("held_out", found.held_out)):
        for number, batch in enumerate(batches):
            if any(tensor.numel() == 0 for tensor in batch):
                raise CalibrationError(
                    f"calibration: expected examples in every batch, found none in batch {number} of {name}; leave it out"
                )
    return found


def whole_inputs(source: Calibration) -> Inputs:
    """All inputs of a Calibration, in its order, in one tensor for each input of the model. Raises CalibrationError where there
    are none, where they are of several shapes, and where a batch holds something else than one row for each example."""
    batches = (*source.fit, *source.held_out)
    if not batches:
        raise CalibrationError("data: expected inputs to train on, found a calibration without any; give some")
    for batch in batches:
        if any(tensor.dim() == 0 for tensor in batch) or len({len(tensor) for tensor in batch}) > 1:
            raise CalibrationError(
                f"data: expected as many examples in every input of a batch, found {shapes_of(batch)}; give as many"
            )
    for column in zip(*batches, strict=True):
        shapes = {tuple(tensor.shape[1:]) for tensor in column}
        if len(shapes) > 1:
            raise CalibrationError(
                "data: expected inputs of one shape, as batches are drawn from all of them, found "
                f"{shape_text(*sorted(shapes))}; make the Calibration of one shape"
            )
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def _in_whole_batches(found: Calibration, batch: int) -> Calibration:
    """Each part by itself in whole batches; where one of them has none, the two are put together and split anew."""
    if not found.fit:
        return found
    fit, held_out = in_batches_of(found.fit, batch), in_batches_of(found.held_out, batch)
    if not fit or (found.held_out and not held_out):
        whole = in_batches_of((*found.fit, *found.held_out), batch)
        held = held_out_of(len(whole))
        fit, held_out = whole[: len(whole) - held], whole[len(whole) - held :]
    if not fit:
        raise CalibrationError(
            f"{found.source}: expected at least {batch} inputs, as the model takes so many at a time, found "
            f"{found.fitted_on + found.held_out_count}; give more"
        )
    return replace(found, fit=fit, held_out=held_out)


def _calibration(
    model: nn.Module,
    inputs: Inputs,
    source: object,
    *,
    seed: int,
    memory: int,
    progress: Progress | None,
    synthetic: bool,
) -> Calibration:
    if isinstance(source, Calibration):
        return source
    if source is None:
        made = synthesise(model, inputs, seed=seed, on_step=_steps(progress or silent)) if synthetic else None
        if made is not None:
            return made
        why = "has no BatchNorm statistics to make any from, no derivatives that lead there, or runs in half precision alone"
        if not synthetic:
            why = "takes so many examples at a time only"
        elif len(inputs) > 1 or inputs[0].dim() != 4:
            why = "takes several inputs" if len(inputs) > 1 else "takes no images, which alone could be made"
        loud = f"no calibration inputs were given and the model {why}: the factors are those of the weights alone, "
        loud += "which loses far more accuracy; give real inputs (--calib)"
        return Calibration((), (), "weights only", "none", (loud,))
    if isinstance(source, str) and source == "weights":
        return Calibration((), (), "weights only", "none", ())
    names = parameter_names(model)[: len(inputs)]
    return read_calibration(source, inputs, seed=seed, import_object=import_object, names=names, memory=memory)


def _without_held(source: Calibration, own: Sequence[str], every: Sequence[str], count: int) -> Calibration:
    """Without the inputs of the graph that are held at the example's values, where it has these too."""
    found = {len(batch) for batch in (*source.fit, *source.held_out)}
    if found <= {count}:
        return source
    if found != {len(every)}:
        names = f" ({', '.join(own)})" if own else ""
        raise CalibrationError(
            f"calibration: expected {count} tensors in every batch, one for each model input{names}, found "
            f"{' and '.join(map(str, sorted(found)))}; make the Calibration of these inputs, in this order"
        )
    places = [position for position, name in enumerate(every) if name in own]
    held = ", ".join(name for name in every if name not in own)
    fit, held_out = (
        tuple(tuple(batch[place] for place in places) for batch in batches) for batches in (source.fit, source.held_out)
    )
    note = f"calibration inputs of {held} were left out: what has no axis of examples stays as in the example input"
    return replace(source, fit=fit, held_out=held_out, notes=(*source.notes, note))


def _steps(progress: Progress) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: progress("synthesise inputs", done, total, f"mismatch {loss:.3g}")


def evaluation_inputs(inputs: Inputs, data: Calibration, batch: int | None = None) -> Evaluation:
    """The held-out inputs where there are any. Called once in a run, as every call draws other noise. ``batch``: how many
    examples the model takes at a time."""
    if data.held_out:
        kind = "calibration" if data.kind == "data" else "synthetic"
        return Evaluation(data.held_out, f"measured on {counted(data.held_out_count, f'held-out {kind} input')}")
    if data.fit:
        return Evaluation(
            data.fit, f"measured on the {counted(data.fitted_on, 'input')} that the factors were fitted on"
        )
    noise = tuple(_noise_like(tensor) for tensor in inputs)
    basis = f"measured on {NOISE_EXAMPLES} random noise inputs: says little about real ones"
    return Evaluation((noise,) if batch is None else in_whole_batches((noise,), batch), basis, noise=True)


def _noise_like(tensor: Tensor) -> Tensor:
    shape = (NOISE_EXAMPLES, *tensor.shape[1:])
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype).to(tensor.device)
    if tensor.dtype == torch.uint8 and tensor.dim() > 3:  # pixels
        return torch.randint(256, shape, dtype=tensor.dtype).to(tensor.device)
    return tensor[:1].expand(shape)  # indices or a mask: the model is known to take these


def channels_last(model: nn.Module, batches: Sequence[Inputs], batch: int | None = None) -> tuple[Inputs, ...]:
    """The batches with the channels of every image last in memory, where the model takes them so.

    The numbers are the same and so are the results, up to rounding; convolutions take up to half the time. A forward that
    calls ``view`` on an image may refuse the layout: then the batches come back as they are. ``batch`` is as in
    :func:`calibrate`.
    """
    moved = tuple(tuple(_last(tensor) for tensor in inputs) for inputs in batches)
    return moved if not moved or _takes(model, tuple(t[: batch or TRIED] for t in moved[0])) else tuple(batches)


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _takes(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.no_grad():
            model(*(tensor.clone() for tensor in inputs))
    except Exception as error:  # a forward may refuse a layout in any way
        if out_of_memory(error):
            raise
        return False
    return True
