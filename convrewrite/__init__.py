"""convrewrite takes a trained CNN (PyTorch or ONNX) and gives a smaller and faster one that still computes the same.

The public names are these; they are imported when first used, so that ``import convrewrite`` stays light.
"""

import importlib
import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# onnxruntime reads this when it is imported, not later. Without it, onnxruntime keeps a file of what ran on this machine in the
# user's cache folder and sends it to its maker. To allow that, set it to 0.

TYPE_CHECKING = False
# That of typing, which is not imported: with ``python -m`` a file in the working folder may still stand in its place.

if TYPE_CHECKING:
    from typing import Any

    __version__: str
    from convrewrite.errors import ConvRewriteError
    from convrewrite.pipeline import (
        RewriteConvolutions,
        Sweep,
        analyze,
        apply,
        export_result,
        optimize,
        plan,
        profile,
        quantise,
        recover,
        sweep,
        verify,
    )
    from convrewrite.planning import Plan
    from convrewrite.results import Result, load
    from convrewrite.runtime import export
    from convrewrite.settings import Recovery, Settings

__all__ = [
    "ConvRewriteError",
    "Plan",
    "Recovery",
    "Result",
    "RewriteConvolutions",
    "Settings",
    "Sweep",
    "analyze",
    "apply",
    "export",
    "export_result",
    "load",
    "optimize",
    "plan",
    "profile",
    "quantise",
    "recover",
    "sweep",
    "verify",
]
_HOMES = {
    "ConvRewriteError": "convrewrite.errors",
    "Plan": "convrewrite.planning",
    "Recovery": "convrewrite.settings",
    "Result": "convrewrite.results",
    "RewriteConvolutions": "convrewrite.pipeline",
    "Settings": "convrewrite.settings",
    "Sweep": "convrewrite.pipeline",
    "analyze": "convrewrite.pipeline",
    "apply": "convrewrite.pipeline",
    "export": "convrewrite.runtime",
    "export_result": "convrewrite.pipeline",
    "load": "convrewrite.results",
    "optimize": "convrewrite.pipeline",
    "plan": "convrewrite.pipeline",
    "profile": "convrewrite.pipeline",
    "quantise": "convrewrite.pipeline",
    "recover": "convrewrite.pipeline",
    "sweep": "convrewrite.pipeline",
    "verify": "convrewrite.pipeline",
}


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        return importlib.import_module("convrewrite.version").tool_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'convrewrite' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
