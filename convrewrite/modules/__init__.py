"""A module as an object: run it, copy it, find everything that holds a part of it, put its state back. Knows no convolution."""

from convrewrite.modules.copying import copy_model, private_copy
from convrewrite.modules.counting import calls_counted, tally
from convrewrite.modules.holders import replace_modules
from convrewrite.modules.hooks import hooked
from convrewrite.modules.moving import put_on
from convrewrite.modules.operator import Operator, Shared
from convrewrite.modules.outputs import ROOT, NamedOutputs, alike, left_out, named_outputs
from convrewrite.modules.running import eval_mode, kept_outputs, run
from convrewrite.modules.state import Snapshot, preserved, surroundings_preserved

__all__ = [
    "ROOT",
    "NamedOutputs",
    "Operator",
    "Shared",
    "Snapshot",
    "alike",
    "calls_counted",
    "copy_model",
    "eval_mode",
    "hooked",
    "kept_outputs",
    "left_out",
    "named_outputs",
    "preserved",
    "private_copy",
    "put_on",
    "replace_modules",
    "run",
    "surroundings_preserved",
    "tally",
]
