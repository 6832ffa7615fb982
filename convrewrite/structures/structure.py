"""What a structure is, an option of it at a site, and the stages that an option has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from convrewrite.conv import ConvSpec, Size

Setting = Mapping[str, int | str]
"""A structure's parameters by name, such as ``{"order": "depthwise-first", "rank": 2}``; ``rank`` is always among them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The shape of one stage: ``axes`` names the kernel axes it owns, ``""``, ``"h"``, ``"w"`` or ``"hw"``."""

    in_channels: int
    out_channels: int
    axes: str = ""
    groups: int = 1

    def kernel_shape(self, kernel_size: Size) -> tuple[int, int, int, int]:
        """The canonical weight shape, given the kernel size of the convolution that is replaced."""
        kh, kw = kernel_size
        return (
            self.out_channels,
            self.in_channels // self.groups,
            kh if "h" in self.axes else 1,
            kw if "w" in self.axes else 1,
        )


class Structure(Protocol):
    """A family of linear replacements. Each file in ``structures/families/`` holds one, as its module attribute ``STRUCTURE``.

    ``spec`` is always ungrouped: the framework splits a grouped convolution and joins the results.
    """

    @property
    def name(self) -> str:
        """The name that rules use."""
        ...

    @property
    def reference(self) -> str:
        """The source that describes it."""
        ...

    def reject(self, spec: ConvSpec) -> str | None:
        """Why this geometry has no such replacement, or None."""
        ...

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        """The discrete choices apart from the rank, for example both orders."""
        ...

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        """The smallest rank that reproduces any kernel exactly."""
        ...

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        """The shapes of the stages, first to last."""
        ...

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        """Initial stage weights for a kernel ``(O, C, kh, kw)``; exact at full rank, in the kernel's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Option:
    """A structure with its parameters and its lowering at one site."""

    structure: str
    setting: tuple[tuple[str, int | str], ...] = ()
    lowering: str = "chain"

    @property
    def parameters(self) -> dict[str, int | str]:
        """The setting as a dictionary."""
        return dict(self.setting)

    def describe(self) -> str:
        """``separable, rank 2, depthwise-first, as branches``."""
        numbers = [f"{name} {value}" for name, value in self.setting if isinstance(value, int)]
        words = [value for _, value in self.setting if isinstance(value, str)]
        lowering = [f"as {self.lowering}"] if self.lowering != "chain" else []
        return ", ".join([self.structure, *numbers, *words, *lowering])
