"""What a batch shows at a site, in both networks."""

from dataclasses import dataclass, replace

from torch import Tensor

from convrewrite.conv import ConvSpec, planar


@dataclass(frozen=True, slots=True)
class Sample:
    """What one batch shows at one call of a site: its input in the rewritten network, its output in the original one (with
    the BatchNorm that is folded into it), and where that is only added to a skip connection that both networks already
    have, this skip in each."""

    batch: int
    rewritten: Tensor
    output: Tensor
    original_skip: Tensor | None = None
    rewritten_skip: Tensor | None = None

    def of_the_same_examples(self, original: Tensor, examples: int) -> "Sample":
        """This, where the site gets of a batch of so many ``examples`` the same in both networks; else the ``original``'s input.

        A forward that picks examples by what convolutions give them picks others in the rewritten network. It shows in other
        shapes, or in inputs of which there is no whole number for each example."""
        if self.rewritten.shape == original.shape and len(original) % examples == 0:
            return self
        return replace(self, rewritten=original, rewritten_skip=self.original_skip)

    def planar(self, spec: ConvSpec) -> "Sample":
        """The same with a height, for a one-dimensional convolution; without gradients, which a convolved parameter has."""
        tensors = (self.rewritten, self.output, self.original_skip, self.rewritten_skip)
        return Sample(self.batch, *(None if t is None else planar(t.detach(), spec) for t in tensors))  # type: ignore[arg-type]

    @property
    def wanted(self) -> Tensor:
        """What the site must give so that the rewritten sum is the original one; without a skip, the original's output."""
        if self.original_skip is None or self.rewritten_skip is None:
            return self.output
        return self.output + self.original_skip - self.rewritten_skip
