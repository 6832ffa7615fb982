"""What every run starts from: the traced model with its sites and what the rules allow there, and the calibration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from convrewrite import arguments
from convrewrite.calibration import Calibration, read_calibration
from convrewrite.conv import Cost
from convrewrite.counting import tally
from convrewrite.errors import ExportError, TraceError
from convrewrite.following import follow
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs, parameter_names, require_common_batch
from convrewrite.lifting import Lifted, lift
from convrewrite.loading import import_object
from convrewrite.meanings import NOTHING, Meaning, tell
from convrewrite.names import require_names
from convrewrite.process import ordinary
from convrewrite.proposing import Menu, menus
from convrewrite.replaceable import without_irreplaceable
from convrewrite.rules import Rule
from convrewrite.sites import Site, find_sites
from convrewrite.structure import Structure
from convrewrite.structures import discover
from convrewrite.synthetic import synthesise
from convrewrite.timing import THIS_MACHINE, Timer
from convrewrite.tracing import Traced

Progress = Callable[[str, int, int, str], None]
"""Called with a stage's name, how many of its steps are done, how many there are, and what is being done."""

NOISE_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run works, whatever it is asked for; see :func:`convrewrite.optimize`."""

    seed: int = 0
    threads: int = 1
    memory: int = 4 << 30
    output_weighting: bool = True
    measure: bool = True
    fast: bool = False
    timer: Timer = THIS_MACHINE

    def __post_init__(self) -> None:
        """Raise UsageError for a number that no run can work with."""
        arguments.seed(self.seed)
        arguments.threads(self.threads)
        arguments.memory_bytes(self.memory)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model in eval mode with its sites, what the rules allow at each, and the whole model's cost.

    ``original`` is the caller's, which never runs; ``model`` a copy of it, functional convolutions ``lifted``.
    """

    original: nn.Module
    lifted: Lifted
    inputs: Inputs
    traced: Traced
    sites: tuple[Site, ...]
    totals: Cost
    rules: tuple[Rule, ...]
    structures: dict[str, Structure]
    menus: tuple[Menu, ...]

    @property
    def model(self) -> nn.Module:
        """What is rewritten."""
        return self.lifted.model

    @property
    def rewritable(self) -> list[Site]:
        """The sites that may be rewritten, whatever the rules say: the same ones when a plan is made and carried out."""
        return [site for site in self.sites if site.refusal is None]


def prepare(
    model: nn.Module,
    inputs: Inputs,
    rules: Sequence[Rule],
    structures: Sequence[Structure] = (),
    original: nn.Module | None = None,
) -> Prepared:
    """Trace the model, find its sites, and ask the rules. Raises TraceError, RuleFileError.

    ``original``: what ``model`` is a copy of, whose state the result will have.
    """
    known = discover() | {structure.name: structure for structure in structures}
    lifted, traced, sites = find(model, inputs)
    totals = whole_cost(lifted.model, inputs)
    return Prepared(
        model if original is None else original,
        lifted,
        inputs,
        traced,
        sites,
        totals,
        tuple(rules),
        known,
        menus(sites, rules, known),
    )


def bound_inputs(model: nn.Module, example_input: ExampleInput) -> Inputs:
    """The example as the tuple of positional inputs, with which torch can differentiate. Raises UsageError."""
    inputs = bind_inputs(model, example_input)
    require_common_batch(inputs)
    return ordinary(inputs)


def find(model: nn.Module, inputs: Inputs) -> tuple[Lifted, Traced, tuple[Site, ...]]:
    """The model with its functional convolutions lifted, its graphs and its sites; raises TraceError when it has none."""
    require_names(model, type(model).__name__)
    lifted = lift(model, inputs)
    traced = follow(lifted.model, inputs)
    sites = find_sites(lifted.model, inputs, traced, lifted.reasons)
    if not sites:
        raise TraceError(f"{type(model).__name__}: the model has no convolution; there is nothing to rewrite")
    return lifted, traced, without_irreplaceable(lifted.model, inputs, sites)


def require_runtime_dtype(model: nn.Module) -> None:
    """Raise ExportError for what onnxruntime cannot run: before the long work, not after it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float64, torch.bfloat16):
            raise ExportError(
                f"{type(model).__name__}: expected float32 weights, found {name} in {str(parameter.dtype)[6:]}, for which "
                "onnxruntime has no convolution; convert the model with model.float(), or leave out export and "
                "measurement (--no-onnx, in Python measure=False)"
            )


def whole_cost(model: nn.Module, inputs: Inputs) -> Cost:
    """Parameters of the whole model; MACs of one example, as a run of it shows them (:func:`convrewrite.counting.tally`)."""
    return Cost(sum(parameter.numel() for parameter in model.parameters()), tally(model, inputs).macs)


def calibrate(
    model: nn.Module,
    inputs: Inputs,
    source: object,
    *,
    seed: int = 0,
    memory: int = 4 << 30,
    progress: Progress | None = None,
) -> Calibration:
    """Real inputs of at most ``memory`` bytes where there are any, else synthesised ones, else none, with a loud note."""
    if isinstance(source, Calibration):
        return source
    if source is None:
        made = synthesise(model, inputs, seed=seed, on_step=_steps(progress or silent))
        if made is not None:
            return made
        why = "has no BatchNorm statistics to make any from, or no derivatives that lead there"
        if len(inputs) > 1 or inputs[0].dim() != 4:
            why = "takes several inputs" if len(inputs) > 1 else "takes no images, which alone could be made"
        loud = f"no calibration inputs were given and the model {why}: the factors are those of the weights alone, "
        loud += "which loses far more accuracy; give real inputs (--calib)"
        return Calibration((), (), "weights only", "none", (loud,))
    if isinstance(source, str) and source == "weights":
        return Calibration((), (), "weights only", "none", ())
    names = parameter_names(model)[: len(inputs)]
    return read_calibration(source, inputs, seed=seed, import_object=import_object, names=names, memory=memory)


def _steps(progress: Progress) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: progress("synthesise inputs", done, total, f"mismatch {loss:.3g}")


@dataclass(frozen=True, slots=True)
class Judged:
    """The inputs that effects, fidelity and parity are measured on in one run, and the sentence that says so; ``noise``: nothing
    but that was there. ``meanings`` are those of the outputs."""

    batches: tuple[Inputs, ...]
    basis: str
    noise: bool = False
    meanings: Mapping[str, Meaning] = field(default_factory=dict)

    def told(self, model: nn.Module, asked: Mapping[str, Meaning], known: Mapping[str, Meaning] = NOTHING) -> "Judged":
        """With what the outputs of the original mean, told on these inputs once for the whole run."""
        meanings = tell(model, self.batches, asked, known=known, representative=not self.noise)
        return replace(self, meanings=meanings)


def judging_inputs(inputs: Inputs, data: Calibration) -> Judged:
    """The held-out inputs where there are any. Drawn once in a run: noise is other noise at every call."""
    if data.held_out:
        kind = "calibration" if data.kind == "data" else "synthetic"
        return Judged(data.held_out, f"measured on {data.held_out_count} held-out {kind} inputs")
    if data.fit:
        return Judged(data.fit, f"measured on the {data.fitted_on} inputs that the factors were fitted on")
    noise = tuple(_noise_like(tensor) for tensor in inputs)
    basis = f"measured on {NOISE_EXAMPLES} random noise inputs: says little about real ones"
    return Judged((noise,), basis, noise=True)


def _noise_like(tensor: Tensor) -> Tensor:
    shape = (NOISE_EXAMPLES, *tensor.shape[1:])
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype)
    return tensor[:1].expand(shape)


def silent(stage: str, done: int, total: int, text: str) -> None:
    """No progress is shown."""
