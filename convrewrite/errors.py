"""What can go wrong, as types a caller can catch.

    ConvRewriteError
    |-- UsageError            a value given by the caller is wrong: exit code 2
    |   |-- RuleFileError     a rule file is not valid
    |   |-- CalibrationError  the calibration inputs cannot be used
    |   |   `-- FitError      one site cannot be fitted to its inputs and outputs
    |   `-- PlanError         a budget cannot be met, or a plan belongs to another model
    |-- ModelError            the model itself stands in the way: exit code 3
    |   |-- ModelLoadError    the file or factory gives no model
    |   |-- TraceError        the model cannot be run or followed
    |   `-- ExportError       the model has no ONNX form
    |-- ProcessLostError      one of several processes of a run has ended: exit code 1
    `-- VerificationError     the result is not what it must be: exit code 1

Every message says where, what was expected, what was found and what to do, in terms of the command line's options; a note on the
error says how Python spells these. Control characters of names from elsewhere are written out in it, so that no file can forge a
line or steer a terminal. "This site was left alone" is not an error: it is data with a reason, and in the report.
"""

from typing import Any, ClassVar

from convrewrite.escaping import printable
from convrewrite.spellings import in_python


class ConvRewriteError(Exception):
    """The root of all errors this package raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *lines: str) -> None:
        """The lines of the message; each stays one line, whatever the names in it contain."""
        super().__init__("\n".join(printable(line.replace("\n", " ")) for line in lines))
        if (spelled := in_python(str(self))) is not None:  # a traceback shows it, and the command line does not
            self.add_note(spelled)

    def __reduce__(self) -> tuple[type, tuple[str, ...], dict[str, Any]]:
        """Made again from its lines, as errors are sent from process to process."""
        return type(self), tuple(str(self).split("\n")), self.__dict__


class UsageError(ConvRewriteError):
    """A value given by the caller is wrong."""

    exit_code = 2


class RuleFileError(UsageError):
    """A rule file is not valid; the message names file, key, expectation and finding."""


class CalibrationError(UsageError):
    """The calibration inputs cannot be read, or do not fit the model."""


class FitError(CalibrationError):
    """One site cannot be fitted to its inputs and outputs, and is kept. ``reason`` is what its row in the report says."""

    def __init__(self, site: str, reason: str) -> None:
        """``reason``: what was expected of the site's numbers, what was found, and what to do."""
        super().__init__(f"{site}: {reason}")
        self.site, self.reason = site, reason

    def __reduce__(self) -> tuple[type, tuple[str, ...], dict[str, Any]]:
        """Made again from its two texts."""
        return type(self), (self.site, self.reason), self.__dict__


class PlanError(UsageError):
    """A budget cannot be met, or a plan does not belong to this model."""


class ModelError(ConvRewriteError):
    """The model itself stands in the way."""

    exit_code = 3


class ModelLoadError(ModelError):
    """The file or the factory gives no usable model."""


class TraceError(ModelError):
    """The model cannot be run on the example input, or not be followed."""


class ExportError(ModelError):
    """The model has no ONNX form."""


class ProcessLostError(ConvRewriteError):
    """Another process of a run in several has ended, and this one cannot go on alone."""


class VerificationError(ConvRewriteError):
    """onnxruntime and torch disagree, or a gate was missed."""
