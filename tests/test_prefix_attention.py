"""prefix_attention: errors at the door, zero gates, one row, what is saved, layouts, and who gets a gradient."""

import dataclasses
from unittest import mock

import pytest
import torch

from benchmarks.providers.prefix_attention import _eager
from vlkernels import backends, prefix_attention
from vlkernels.ops.prefix_attention import cases
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
CASE = {c.name: c for c in cases.CASES}


def given(name="everything", precision="fp32", **changes) -> dict:
    return cases.inputs(CASE[name], Make(PRECISIONS[precision])) | changes


def leaves(kw: dict) -> dict:
    return {n: t for n, t in kw.items() if isinstance(t, torch.Tensor) and t.requires_grad}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"k": torch.zeros(1, 65, 1, 12), "v": torch.zeros(1, 65, 1, 12)}, "the prefix has 65 rows; accepted: 1 to 64"),
        ({"k": torch.zeros(1, 0, 1, 12), "v": torch.zeros(1, 0, 1, 12)}, "the prefix has 0 rows"),
        ({"k": torch.zeros(1, 5, 3, 12), "v": torch.zeros(1, 5, 3, 12)}, "k has 3 heads; accepted: .* the 2 heads"),
        ({"k": torch.zeros(3, 5, 1, 12), "v": torch.zeros(3, 5, 1, 12)}, r"accepted .* \(B or 1, P, G, K\) with B = 2"),
        ({"v": torch.zeros(2, 5, 2, 12)}, "v has shape .* the shape of k"),
        ({"q": torch.zeros(2, 33, 4, 12)}, "q has shape .* the shape of o"),
        ({"gate": torch.zeros(3)}, r"gate has shape \(3,\); accepted: \(H,\) = \(2,\) or \(1,\)"),
        ({"gate": torch.zeros(1, 2, 1, 1)}, "gate has shape"),
        ({"factor": torch.zeros(4)}, "factor has shape"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"o": torch.zeros(2, 33, 24)}, r"accepted: \(B, L, H, K\)"),
    ],
)
def test_errors_at_the_door(changes, says):
    with pytest.raises(ValueError, match=says):
        prefix_attention(**given(**changes))


def test_dtypes_at_the_door():
    with pytest.raises(TypeError, match="q has dtype torch.bfloat16, o has torch.float32"):
        prefix_attention(**given(q=given()["q"].detach().bfloat16()))
    with pytest.raises(TypeError, match="gate has dtype torch.int64"):
        prefix_attention(**given(gate=torch.zeros(2, dtype=torch.int64)))


@interpreted
def test_wide_heads_are_refused():
    o, k = torch.zeros(1, 3, 2, 160), torch.zeros(1, 4, 2, 160)
    values = prefix_attention.values(o, o, k, k, torch.zeros(2))
    assert "head dim 160" in backends.verdict(prefix_attention, "triton", values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_zero_gate_changes_no_bit(backend, precision):
    """y is o, and its gradient the output's own; the gate still learns."""
    for name in ("frozen", "one-row"):
        kw = {n: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t
              for n, t in given(name, precision, tanh=name == "one-row").items()}  # fmt: skip
        kw["gate"] = torch.zeros_like(kw["gate"]).requires_grad_()
        y = prefix_attention(**kw, backend=backend)
        assert torch.equal(y, kw["o"])
        dy = torch.randn_like(y)
        found = dict(zip(leaves(kw), torch.autograd.grad(y, list(leaves(kw).values()), dy), strict=True))
        assert torch.equal(found["o"], dy) and found["gate"].abs().min() > 0
        assert not any(t.any() for n, t in found.items() if n not in ("o", "gate"))


@interpreted
def test_the_gradient_of_o_is_not_copied():
    kw = given()
    y = prefix_attention(**kw, backend="triton")
    dy = torch.randn_like(y)
    assert torch.autograd.grad(y, kw["o"], dy)[0].data_ptr() == dy.data_ptr()
    frozen = {n: t.detach() if isinstance(t, torch.Tensor) and n != "o" else t for n, t in kw.items()}
    y = prefix_attention(**frozen, backend="triton")
    with meter.launches() as counts:
        assert torch.equal(torch.autograd.grad(y, kw["o"], dy)[0], dy)
    assert not counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_needs_no_softmax(backend):
    kw = given("one-row")
    y = prefix_attention(**kw, backend=backend)
    want = kw["o"] + (kw["gate"].tanh() * kw["factor"])[:, None] * kw["v"]
    assert float((y - want).detach().abs().max()) <= 4 * compare.ulp(float(want.detach().abs().max()), torch.float32)
    dq, dk = torch.autograd.grad(y.square().sum(), [kw["q"], kw["k"]])
    assert float(max(dq.abs().max(), dk.abs().max())) <= 4 * compare.ulp(1.0, torch.float32)


@interpreted
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.3, 0.7, 3.0])
def test_gates_of_every_size(size):
    """Near 0, where gates begin, and where tanh saturates: float32's digits relative to the result."""
    kw = given("frozen", o=torch.zeros(2, 9, 2, 6))
    kw["gate"] = torch.full((2,), size)
    y = prefix_attention(**kw, backend="triton")
    truth = prefix_attention(**{n: compare.doubled(t) for n, t in kw.items()}, backend="reference")
    assert float((y - truth).abs().max()) <= 4 * compare.ulp(float(truth.abs().max()), torch.float32)


@interpreted
def test_saved_bytes():
    """Nothing beyond q, k, v and the gate is kept, where the equation in plain PyTorch keeps scores and products."""
    kw = given("shared", "bf16")
    apart = [t for t in kw.values() if isinstance(t, torch.Tensor)]
    ours = meter.saved_bytes(lambda: prefix_attention(**kw, backend="triton"), apart)
    eager = meter.saved_bytes(lambda: _eager(**kw), apart)
    assert ours == 0 and eager > 0 and ours <= 0.05 * eager


@interpreted
def test_both_layouts_without_a_copy():
    kw = given("shared")
    plain = {n: t.detach().contiguous() if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
    assert kw["o"].stride() != plain["o"].stride()
    with meter.traffic() as traffic:
        y = prefix_attention(**kw, backend="triton")
    assert set(traffic.launches) == {"prefix_attention_fwd_kernel"} and y.is_contiguous()
    assert torch.equal(y, prefix_attention(**plain, backend="triton"))


@interpreted
def test_gates_of_more_tiles_than_one_pass_sums():
    kw, kernels = given("one-gate"), prefix_attention.kernels["triton"]
    want = torch.autograd.grad(prefix_attention(**kw, backend="triton").sum(), kw["gate"])[0]
    config = kernels.config

    def one_row(*args):
        return dataclasses.replace(config(*args), gate_rows=1)

    with mock.patch.object(kernels, "config", one_row):
        got = torch.autograd.grad(prefix_attention(**kw, backend="triton").sum(), kw["gate"])[0]
    assert float((got - want).abs()) <= 8 * compare.ulp(float(want.abs()), torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["one-gate", "longest"])
def test_any_of_the_gradients_alone(name):
    """The same bits as when all are asked for; "longest" in float32 takes one launch for each."""
    kw = given(name)
    y = prefix_attention(**kw, backend="triton")
    want = dict(zip(leaves(kw), torch.autograd.grad(y.sum(), list(leaves(kw).values())), strict=True))
    for names in (("q",), ("v",), ("gate",), ("o", "k")):
        some = {n: t.detach().requires_grad_(n in names) if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
        y = prefix_attention(**some, backend="triton")
        for n, grad in zip(names, torch.autograd.grad(y.sum(), [some[n] for n in names]), strict=True):
            assert torch.equal(grad, want[n]), (names, n)
