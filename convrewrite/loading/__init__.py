"""Files and programs -> a module, without running code that the user did not name."""

from convrewrite.loading.files import Loaded, load_model
from convrewrite.loading.input_shapes import (
    MOST_NUMBERS,
    find_input_shape,
    parse_shape,
    runs_on,
    stated_input_shapes,
)
from convrewrite.loading.programs import rebuild
from convrewrite.loading.user_code import import_object, is_program

__all__ = [
    "MOST_NUMBERS",
    "Loaded",
    "find_input_shape",
    "import_object",
    "is_program",
    "load_model",
    "parse_shape",
    "rebuild",
    "runs_on",
    "stated_input_shapes",
]
