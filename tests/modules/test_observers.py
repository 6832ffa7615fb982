"""Models that are prepared for quantisation-aware training."""

import pytest
import torch
from torch import nn

from convrewrite import optimize
from convrewrite.errors import TraceError

X = torch.zeros(1, 3, 8, 8)
DATA = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min:UserWarning")
def test_observers_at_work_are_named_with_what_stops_them() -> None:
    torch.manual_seed(0)
    quantization = torch.ao.quantization
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    first.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    model = quantization.prepare_qat(nn.Sequential(first, second).train())
    model(DATA)
    model.eval()
    with pytest.raises(TraceError, match=r"rewrite the model before it is prepared.*disable_observer"):
        optimize(model, X, ["separable"], DATA, measure=False, refine=False)
    model.apply(quantization.disable_observer)
    sites = {
        site.name: site for site in optimize(model, X, ["separable"], DATA, measure=False, refine=False).report.sites
    }
    assert "subclass of a convolution" in str(sites["0"].reason)
    assert sites["1"].option is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_whose_output_depends_on_its_state_is_refused_with_the_reason() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x * self.count

    model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(Counting()))
    with pytest.raises(TraceError, match="depends on state that its forward changes"):
        optimize(model, X, ["separable"], DATA, measure=False)
