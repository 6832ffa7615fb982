"""A file quantised in a few ways, of which the one that is nearest to the original on held-out inputs is kept."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from convrewrite.errors import ExportError, VerificationError
from convrewrite.escaping import one_line
from convrewrite.folders import disk_full, require_room, temporary, unwritable, write_errors
from convrewrite.inputs import Inputs, examples_in
from convrewrite.machine import adds_bytes
from convrewrite.meanings import Fidelity, Meaning
from convrewrite.onnx_files import OnnxModel, mark_form, read_model
from convrewrite.process import quiet
from convrewrite.quantising.even import POWERS, Feeds, evened, has_pairs
from convrewrite.runtime import measure_fidelity


@dataclass(frozen=True, slots=True)
class Way:
    """One way to quantise: weights with a scale for every output channel or for all;
    the power of :func:`evened`, None for none."""

    per_channel: bool
    power: float | None

    def describe(self) -> str:
        """As in a table."""
        scales = {None: "no scales", 0.5: "shared scales", 1.0: "even scales"}[self.power]
        return f"per {'channel' if self.per_channel else 'tensor'}, {scales}"


@dataclass(frozen=True, slots=True)
class Quantised:
    """The int8 file that was kept, how it was made, and its fidelity to the original on held-out inputs; ``tried``: that of every
    way, as the effect on the outputs."""

    path: Path
    way: Way
    fidelity: Fidelity
    tried: dict[str, float]


def quantise_file(
    path: Path,
    place: Path,
    fit: Sequence[Inputs],
    held_out: Sequence[Inputs],
    *,
    original: Path | None = None,
    meanings: Mapping[str, Meaning] | None = None,
    scales: bool = True,
    runner: Callable[[Path], OnnxModel] = OnnxModel,
) -> Quantised:
    """Quantise a float32 file to static int8 (QDQ) on the inputs in ``fit`` and put it at ``place``.

    It is judged on ``held_out`` against ``original``, by default the file itself, according to what outputs mean: ``meanings``,
    None: as inferred there. ``scales`` False tries none between stages. ``runner`` opens files with the values by which they are
    judged, and may hold inputs, which ``fit`` and ``held_out`` leave out then. A way whose file onnxruntime does not open, as
    scales for every channel below opset 13, is not taken. Raises ExportError where onnxruntime's quantiser cannot, or no way is
    left, VerificationError where there are no inputs.
    """
    if not fit or not held_out:
        found = f"{sum(map(examples_in, fit))} and none; give more" if fit else "none; give real ones"
        raise VerificationError(f"int8: expected inputs to calibrate and to judge on, found {found} (--calib)")
    reference, source_file = runner(original or path), runner(path)
    feeds = [_feed(source_file, batch) for batch in fit]
    model = read_model(path, weights=True)
    mark_form(model, "int8")
    del model.training_info[:]  # its graphs name weights in float32, which are not there any more
    best: Quantised | None = None
    tried: dict[str, float] = {}
    unopened: VerificationError | None = None
    with temporary() as scratch:
        made = scratch.path / "int8.onnx"
        for power in POWERS if scales and has_pairs(model) else (None,):
            source = model if power is None else evened(model, feeds, power)
            for per_channel in (True, False):
                way = Way(per_channel, power)
                _quantised(source, made, feeds, per_channel)
                try:
                    opened = runner(made)
                except VerificationError as error:
                    unopened = error
                    continue
                fidelity = measure_fidelity(reference, opened, held_out, meanings)
                tried[way.describe()] = fidelity.effect
                if best is None or fidelity.effect < best.fidelity.effect:
                    best = Quantised(place, way, fidelity, tried)
                    shutil.copyfile(made, place)
    if best is None:
        cause = str(unopened).replace(str(made), "the int8 file")
        raise ExportError(
            f"int8: what onnxruntime's quantiser makes of the model cannot be used: {cause}; do without int8"
        )
    return best


def _feed(model: OnnxModel, inputs: Inputs) -> dict[str, Any]:
    """Arrays for all inputs of a file, those that it holds too."""
    given = {**dict(zip(model.input_names, inputs, strict=True)), **model.held}
    return {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}


def _quantised(model: onnx.ModelProto, place: Path, feeds: Feeds, per_channel: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batch after batch."""

        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Any:
            return next(self._left, None)

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        with quiet(("root",)):
            quantize_static(
                copy, str(place), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel, reduce_range=not adds_bytes(),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
    except Exception as error:  # the quantiser raises its own, and onnx's
        if disk_full(error) is not None:  # it writes to the place, and its drafts to the temporary files
            with write_errors(place):
                require_room(place)
            raise unwritable(None, str(disk_full(error))) from error
        cause = one_line(error, 200)
        raise ExportError(f"int8: onnxruntime's quantiser cannot quantise the model: {cause}") from error
