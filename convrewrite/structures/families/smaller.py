"""Smaller: the middle of the kernel, one convolution as before: 3 x 3 becomes 3 x 1, 1 x 3 or 1 x 1.

Nothing is factorised: the rows and columns at the ends go, and what is left is solved for on the real inputs in closed form, so
that it takes over what it can of them. One dense operator with fewer taps is what every runtime runs best.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec, Size
from convrewrite.structures.algebra import cropped
from convrewrite.structures.structure import Setting, Stage

AXES = {"height": "h", "width": "w", "height-and-width": "hw"}
"""The words of the parameter ``along``: which axes of the kernel become shorter."""


class Smaller:
    """See the module's text; with each ``rank`` below the full one a row, or a column, goes at either end, down to one."""

    name = "smaller"
    reference = "least squares"

    def reject(self, spec: ConvSpec) -> str | None:
        if max(spec.kernel_size) < 3:
            return "its kernel has no rows or columns around its middle to leave out"
        if not any(_removable(spec)):
            return "its padding is too narrow for a kernel with fewer rows or columns"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        rows, columns = _around_middle(spec)
        if rows and columns:
            return tuple({"along": word} for word in AXES)
        return ({"along": "height" if rows else "width"},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        rows, columns = _around_middle(spec)
        axes = AXES[str(variant["along"])]
        return 1 + max(rows if "h" in axes else 0, columns if "w" in axes else 0)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        axes, steps = AXES[str(setting["along"])], self.full_rank(spec, setting) - int(setting["rank"])
        rows, columns = _removable(spec)
        crop = (min(steps, rows) if "h" in axes else 0, min(steps, columns) if "w" in axes else 0)
        return (Stage(spec.in_channels, spec.out_channels, "hw", crop=crop),)

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        return (cropped(self.stages(spec, setting)[0], kernel).clone(),)


def _around_middle(spec: ConvSpec) -> Size:
    """Rows and columns of the kernel at either end of its middle one, or middle two."""
    height, width = spec.kernel_size
    return (height - 1) // 2, (width - 1) // 2


def _removable(spec: ConvSpec) -> Size:
    """As many of them as the padding can become narrower by: a padding below zero is none."""
    rows, columns = _around_middle(spec)
    if isinstance(spec.padding, str):
        return (rows, columns) if spec.padding == "same" else (0, 0)
    vertical, horizontal = (padding // dilation for padding, dilation in zip(spec.padding, spec.dilation, strict=True))
    return min(rows, vertical), min(columns, horizontal)


STRUCTURE = Smaller()
