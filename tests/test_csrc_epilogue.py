"""mlp_projector's cuda backend: the compiled product with GELU in its epilogue, emulated on the host."""

import pytest
import torch
from test_csrc_two_source import BF16, emulated  # noqa: F401  (a fixture)

import vlkernels
from vlkernels.ops import _two_source
from vlkernels.ops.mlp_projector import cuda
from vlkernels.ops.mlp_projector.cases import CASES, TERMS
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS


@pytest.fixture
def epilogue(emulated, monkeypatch):  # noqa: F811
    """mlp_projector's cuda backend over the emulated kernel; the list of its calls."""
    calls = []

    def linear_act(x2, weight, bias, act, out, pre):
        calls.append(act)
        emulated.two_source_forward(x2, weight, None, None, bias, None, 1.0, act == "gelu", pre, out)

    monkeypatch.setattr(_two_source, "linear_act", linear_act)
    monkeypatch.setattr(cuda, "refuses", cuda.does_not_fit)
    monkeypatch.setitem(vlkernels.mlp_projector.kernels, "cuda", cuda)
    return calls


@pytest.mark.parametrize("precision", ["bf16", "fp16", "amp-bf16"])
def test_mlp_projector_through_the_epilogue(epilogue, precision):
    """The op by the rule, outputs and gradients, at both levels; what its product does not take is refused."""
    op, precision = vlkernels.mlp_projector, PRECISIONS[precision]
    case = next(c for c in CASES if str(c) == "llava")
    for changed in (case, case.derived(level=1), case.derived(norm="layer", norm_bias=True, residual=False)):
        epilogue.clear()
        found = compare.errors(op, changed, precision, "cuda")
        assert all(e.ok for e in found), [str(e) for e in found if not e.ok]
        assert epilogue == ["gelu"]
        assert not all(e.ok for e in compare.errors(op, changed, precision, "cuda", change=TERMS["b1 dropped"]))


def test_mlp_projector_says_what_the_epilogue_does_not_take():
    def reason(**changes):
        kw = {"x": torch.zeros(4, 16, dtype=BF16), "w1": torch.zeros(24, 16, dtype=BF16)} | changes
        kw = {"w2": torch.zeros(8, 24, dtype=kw["x"].dtype), "b1": None} | kw
        return cuda.does_not_fit(*vlkernels.mlp_projector.values(**kw))

    assert reason() is None
    assert reason(act="silu") == "act is 'silu'; the compiled epilogue is plain gelu"
    assert "with a gate" in reason(wg=torch.zeros(24, 16, dtype=BF16))
    assert "float32" in reason(x=torch.zeros(4, 16), w1=torch.zeros(24, 16))
    narrow = {"x": torch.zeros(4, 12, dtype=BF16), "w1": torch.zeros(24, 12, dtype=BF16)}
    assert reason(**narrow) == "w1 has 12 columns; bulk copies take multiples of 8"
    assert reason(x=torch.zeros(4, 20, dtype=BF16)[:, 4:]).startswith("x has row stride 20")
    # what a norm or autocast makes anew is aligned
    scaled = {"norm": "rms", "norm_weight": torch.ones(16, dtype=BF16)}
    assert reason(x=torch.zeros(4, 20, dtype=BF16)[:, 4:], **scaled) is None
    assert reason(x=torch.zeros(4, 20)[:, 4:], dtype=BF16) is None
    values = vlkernels.mlp_projector.values(torch.zeros(4, 16), torch.zeros(24, 16), torch.zeros(8, 24))
    assert cuda.refuses(*values).startswith("x is on cpu")
