"""What a batch shows at a site, in both networks."""

from dataclasses import dataclass, replace

from torch import Tensor

from convrewrite.conv import ConvSpec, planar


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch at one call of a site: its input in the rewritten network, its output in the original one (with the BatchNorm
    that is folded into it), and if that output is only added to a skip connection that both networks already have computed, this
    skip in each."""

    batch: int
    rewritten: Tensor
    output: Tensor
    original_skip: Tensor | None = None
    rewritten_skip: Tensor | None = None

    def of_the_same_examples(self, original: Tensor, examples: int) -> "Sample":
        """The sample itself where the site gets the same examples in both networks, otherwise one with the ``original``'s input.

        A forward that picks some of a batch's ``examples`` by the outputs of convolutions may pick others in the rewritten
        network. This is assumed where shapes differ, or where the number of inputs is no multiple of the number of examples."""
        if self.rewritten.shape == original.shape and len(original) % examples == 0:
            return self
        return replace(self, rewritten=original, rewritten_skip=self.original_skip)

    def planar(self, spec: ConvSpec) -> "Sample":
        """The same, with a height added for a one-dimensional convolution, and detached, as a parameter may be what is
        convolved."""
        tensors = (self.rewritten, self.output, self.original_skip, self.rewritten_skip)
        return Sample(self.batch, *(None if t is None else planar(t.detach(), spec) for t in tensors))  # type: ignore[arg-type]

    @property
    def wanted(self) -> Tensor:
        """The output with which the rewritten sum equals the original one; without a skip, the original's output."""
        if self.original_skip is None or self.rewritten_skip is None:
            return self.output
        return self.output + self.original_skip - self.rewritten_skip
