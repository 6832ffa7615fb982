"""What a model can run on: runtimes as one small protocol, one file each, and how they are timed. Light: no torch."""

from convrewrite.targets.discovery import DEFAULT, target_of
from convrewrite.targets.interleaving import Comparison, compare, framed_seconds, whole_seconds
from convrewrite.targets.kinds.onnx_runtime import OnnxRuntime, session_options
from convrewrite.targets.kinds.torch_eager import TorchEager
from convrewrite.targets.profiles import (
    ORIGINAL,
    Profile,
    is_graphs,
    list_graphs,
    profile_graphs,
    read_profile,
    save_profile,
)
from convrewrite.targets.target import Clock, Compiled, Program, Target

__all__ = [
    "DEFAULT",
    "ORIGINAL",
    "Clock",
    "Comparison",
    "Compiled",
    "OnnxRuntime",
    "Profile",
    "Program",
    "Target",
    "TorchEager",
    "compare",
    "framed_seconds",
    "is_graphs",
    "list_graphs",
    "profile_graphs",
    "read_profile",
    "save_profile",
    "session_options",
    "target_of",
    "whole_seconds",
]
