"""Copies of a model that share nothing with it, and the check that they do not.

``copy.deepcopy`` shares functions, methods of lists and dictionaries, and weak references: a hook of the copy that fills a
dictionary in its closure would fill the original's. So such functions are made again with what the copy holds. State that
cannot be copied at all, as in attributes of a class or in global names, shows when both are run.
"""

import copy
import functools
import gc
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import TraceError
from convrewrite.escaping import message_of, one_line, summary
from convrewrite.inputs import Inputs, varied
from convrewrite.modules.counting import Watch
from convrewrite.modules.holders import CACHED, VIEWS, is_importable, is_plain, reachable, referent, replace_parts
from convrewrite.modules.outputs import alike, named_outputs
from convrewrite.modules.running import WITHOUT_FUNCTIONS, eval_mode, higher_order, kept_outputs, run
from convrewrite.modules.state import Snapshot, preserved
from convrewrite.process import ordinary_mode
from convrewrite.state import address_of, named_parameters_of
from convrewrite.values import some_of

_WITHOUT_STATE = (types.FunctionType, tuple, frozenset)
_WEAK = (weakref.ReferenceType, weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
_VIEWS = (weakref.ProxyType, weakref.CallableProxyType, *VIEWS)


_WITHOUT_HISTORY = "rewrite a version whose output depends on its input alone"
_WITHOUT_OBSERVERS = (
    "it is prepared for quantisation-aware training, and its observers measure at every run: rewrite the model before it is "
    "prepared, and prepare the result; or stop them, with model.apply(torch.ao.quantization.disable_observer), after which "
    "convolutions that are prepared stay as they are"
)


def copy_model(model: nn.Module, *, as_it_is: bool = False, sharing: Iterable[Tensor] = ()) -> nn.Module:
    """A copy in eval mode that shares no state with the model but the tensors ``sharing``, which nothing may change;
    ``as_it_is``: every module in the mode it is in.

    Raises TraceError for a model that cannot be copied.
    """
    try:
        with ordinary_mode():
            clone = _copied(model, sharing)
            _require_own_parts(model, clone)
            if not as_it_is:
                clone.eval()  # which a class may override without giving anything back
            return clone
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__}: the model cannot be copied ({one_line(error)}); {_what_to_do(error)}"
        ) from error


def _require_own_parts(model: nn.Module, clone: nn.Module) -> None:
    """Raise TraceError where a class has made parts of the original parts of its copy: what is done to the copy would be done to
    these, too."""
    made = set(clone.modules())
    kept = next((name for name, module in model.named_modules() if module in made), None)
    if kept is not None:
        kind = type(model.get_submodule(kept)).__name__
        raise TraceError(
            f"{type(model).__name__}: expected copy.deepcopy to copy every part of the model, found {kept or 'the model'} itself "
            f"({kind}) in the copy, as its __deepcopy__ says; take it off the model before, and put it on the result"
        )


def _what_to_do(error: Exception) -> str:
    """Advice for a model that cannot be copied."""
    if isinstance(error, TypeError) and "pickle" in message_of(error):
        return "a model that holds open files, locks or generators must let go of them first"
    return "copy.deepcopy(model).eval() has to work first"


def private_copy(model: nn.Module, inputs: Inputs) -> nn.Module:
    """:func:`copy_model`, and a check on two inputs that the copy computes what the model computes, without the model's tensors.

    The model runs for that; what its forward changes in it is put back. Raises TraceError where it does not run on
    ``inputs``, where the copy gives something else or uses the model's own tensors, and where the same input gives another
    output after other inputs.
    """
    clone = copy_model(model)
    batches = (inputs, varied(inputs))
    with preserved(model), eval_mode(model):
        expected = [found for found in (_seeded(model, batch, needed=batch is inputs) for batch in batches) if found]
    snapshot = Snapshot(clone)
    with ordinary_mode(), Watch() as watch:
        found = [_seeded(clone, batch) for batch in batches[: len(expected)]]
    own = {address_of(value) for value in reachable(model) if isinstance(value, Tensor)} - {0}
    # A model that holds its trainer holds the data that they are cut from.
    given = {address_of(value) for value in inputs}
    shared = bool((own - given) & watch.storages)
    same = all(two is not None and alike(one, two) for one, two in zip(expected, found, strict=True))
    changes = snapshot.changed()
    again = _seeded(clone, inputs)
    if same and not shared and again is not None and alike(expected[0], again):
        made = {name for name, _ in named_parameters_of(clone)} - {name for name, _ in named_parameters_of(model)}
        snapshot.restore()
        if made:
            _require_same_weights(clone, inputs, made, expected[0])
            snapshot.restore()
        return clone
    stays = [name or "the model" for name, module in clone.named_modules() if module.training]
    if stays and not same:
        raise TraceError(
            f"{type(model).__name__}: expected a model that eval() puts in eval mode, found {stays[0]} in train mode behind it; "
            "let its train() do as it is told, and let what is to stay random draw its numbers in any mode"
        )
    if found[0] is None:  # the copy does not even run where the original does: its error says more
        _require_running(clone, inputs)
    raise TraceError(_why(model, same and not shared, shared, changes))


def _require_running(clone: nn.Module, inputs: Inputs) -> None:
    """Raise TraceError where a copy of a model that runs does not, with what is missing in it."""
    try:
        _seeded(clone, inputs, needed=True)
    except TraceError as error:
        if higher_order(clone) is not None:
            raise
        kind = type(clone).__name__
        raise TraceError(
            f"{kind}: a copy of the model does not run where the model does ({summary(error.__cause__)}): something that its "
            "forward reaches is not copied along, as what a class keeps in slots or by the identity of its objects; "
            "copy.deepcopy(model).eval() has to give a model that runs"
        ) from error


def _require_same_weights(
    model: nn.Module, inputs: Inputs, made: Iterable[str], expected: Mapping[str, Tensor]
) -> None:
    """Raise TraceError where the first run of a model makes parameters of random numbers, which differ at every first run."""
    if not alike(expected, named_outputs(run(model, inputs, draw=1))):
        raise TraceError(
            f"{type(model).__name__}: expected all weights of a trained model, found that its first run makes "
            f"{some_of(sorted(made), 3)} of random numbers; run the model once, and load or train its weights, before it is given"
        )


def _why(model: nn.Module, fits: bool, shared: bool, changes: tuple[str, ...]) -> str:
    where = type(model).__name__
    if fits:
        what = f" ({', '.join(changes)})" if changes else ""
        return (
            f"{where}: the same input gives another output once the model has run: its output depends on state that its "
            f"forward changes{what}; {_WITHOUT_OBSERVERS if _observes(model) else _WITHOUT_HISTORY}"
        )
    why = "uses tensors of the original" if shared else "gives other outputs than the original"
    called = higher_order(model)
    if called is not None:
        return (
            f"{where}: expected operators of tensors alone, found {called}, which runs functions of its own: a copy of the model "
            f"{why}; {WITHOUT_FUNCTIONS}"
        )
    return (
        f"{where}: a copy of the model {why}: its forward reaches parts of it through something that cannot be copied, as an "
        "attribute of a class or a global name; hold every part as an attribute of the model"
    )


def _observes(model: nn.Module) -> bool:
    """Whether observers of torch's preparation for quantisation-aware training are at work."""
    switches = (buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "observer_enabled")
    return any(bool(switch.any()) for switch in switches)


def _seeded(model: nn.Module, inputs: Inputs, *, needed: bool = False) -> dict[str, Tensor] | None:
    """What the model gives, always with the same random numbers; None where it does not run and is not ``needed``."""
    try:
        return kept_outputs(model, inputs)
    except TraceError:
        if needed:
            raise
        return None


def _copied(model: nn.Module, sharing: Iterable[Tensor]) -> nn.Module:
    memo: dict[int, Any] = {id(tensor): tensor for tensor in sharing}
    special: list[Any] = []
    views: list[tuple[object, Any]] = []
    for value in reachable(model):
        if type(value) in _VIEWS:  # deepcopy refuses them, or takes them for what they show
            views.append((object(), value))
            memo[id(value)] = views[-1][0]
        elif isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()  # deepcopy refuses tensors in a graph of gradients
        elif _is_special(value):
            special.append(value)
    clone = copy.deepcopy(model, memo)
    if special or views:
        functions = _remade_functions(special, memo)
        places = {id(placeholder): _viewed(view, memo) for placeholder, view in views}
        places |= {key: made for key, made in memo.items() if key != id(memo) and id(made) not in places}
        places |= {id(old): new for old, new in functions}
        replace_parts((clone, *(new for _, new in functions)), places)
    return clone


def _viewed(view: Any, memo: dict[int, Any]) -> Any:
    """The same view of the copy of what it shows."""
    if type(view) in VIEWS:
        return VIEWS[type(view)](copy.deepcopy(gc.get_referents(view)[0], memo))
    shown = referent(view)
    return weakref.proxy(memo.get(id(shown), shown))


def _is_special(value: Any) -> bool:
    """Whether ``deepcopy`` would share a value although it may lead to parts of the model."""
    if isinstance(value, types.FunctionType):
        return any(not isinstance(part, _WITHOUT_STATE) for part in reachable(value))
    return isinstance(value, (types.BuiltinMethodType, *_WEAK, CACHED))


def _remade_functions(special: list[Any], memo: dict[int, Any]) -> list[tuple[Any, Any]]:
    """(function, one with the same code and copies of what it holds). Functions in these copies are still the old ones."""
    functions = [value for value in special if isinstance(value, types.FunctionType)]
    cells = {id(cell): (cell, types.CellType()) for function in functions for cell in function.__closure__ or ()}
    for old, new in cells.values():
        try:
            new.cell_contents = _part(old.cell_contents, memo)
        except ValueError:  # nothing is in it yet
            continue
    for value in special:
        if isinstance(value, types.BuiltinMethodType) and id(value.__self__) not in memo:
            _part(value.__self__, memo)
    return [(function, _remade(function, cells, memo)) for function in functions]


def _remade(
    function: types.FunctionType, cells: Mapping[int, tuple[Any, types.CellType]], memo: dict[int, Any]
) -> types.FunctionType:
    closure = tuple(cells[id(cell)][1] for cell in function.__closure__ or ()) or None
    defaults = tuple(_parts(function.__defaults__ or (), memo)) or None
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    if function.__kwdefaults__:
        names, values = zip(*function.__kwdefaults__.items(), strict=True)
        new.__kwdefaults__ = dict(zip(names, _parts(values, memo), strict=True))
    functools.update_wrapper(new, function, updated=())
    new.__dict__.clear()  # update_wrapper has put the old function there, as __wrapped__
    new.__dict__.update({key: _part(value, memo) for key, value in vars(function).items()})
    return new


def _parts(values: tuple[Any, ...], memo: dict[int, Any]) -> Iterator[Any]:
    for value in values:
        yield _part(value, memo)


def _part(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a function holds; what cannot be copied, as an open file, is shared."""
    if is_plain(value) or (isinstance(value, types.FunctionType) and not is_importable(value)):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # any class may refuse in any way
        return value
