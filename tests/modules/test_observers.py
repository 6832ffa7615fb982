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
