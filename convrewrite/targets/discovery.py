"""The targets, discovered: every module in ``kinds``, and every entry point in the group below, holds one.

A module has its target's type as the attribute ``TARGET``, which is called with what follows the colon. Another package
adds one without touching this one:

    [project.entry-points."convrewrite.targets"]
    tflite = "my_package.tflite:TARGET"
"""

from collections.abc import Callable

from convrewrite.errors import ConvRewriteError, UsageError
from convrewrite.escaping import message_of
from convrewrite.plugins import plugins
from convrewrite.targets import kinds
from convrewrite.targets.target import Target
from convrewrite.values import near

ENTRY_POINTS = "convrewrite.targets"

DEFAULT = "onnxruntime"
"""The target unless another is named."""

TargetMaker = Callable[[str], Target]
"""What makes a target of the option after its colon, which is empty if there is none."""


def kinds_of_targets() -> dict[str, TargetMaker]:
    """All kinds by the names they are asked for, those of this package first."""
    return {kind("").name: kind for kind in plugins(kinds, "TARGET", ENTRY_POINTS)}


def target_of(text: str) -> Target:
    """The target of ``NAME`` or ``NAME:option``, known to be installed.

    Raises UsageError for a name that is not known, an option that it does not have, and a package that is missing.
    """
    name, _, option = text.partition(":")
    known = kinds_of_targets()
    if name not in known:
        raise UsageError(
            f"--runtime: expected one of {', '.join(known)}, or with an option, as onnxruntime:cuda, found {text[:60]!r}"
            f"{near(name, known)}"
        )
    target = known[name](option)
    try:
        target.version()
    except ImportError as error:
        raise UsageError(
            f"--runtime {target.name}: needs the package {target.package}, which is not installed here; "
            f"pip install {target.package}"
        ) from error
    except ConvRewriteError:
        raise
    except Exception as error:  # code of another package may raise anything
        raise UsageError(
            f"--runtime {target.name}: asked for its version it raised {type(error).__name__}: {message_of(error)}; mend or "
            f"reinstall {target.package}"
        ) from error
    return target
