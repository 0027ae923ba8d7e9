"""norm_residual and mlp_projector's residual: what cases.py does not say."""

import os

import pytest
import torch
import torch.nn.functional as F

from vlkernels import backends, explain, mlp_projector, norm_residual, use_backend
from vlkernels.ops._dropout import keep_factor, keep_mask
from vlkernels.testing import compare, meter

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
T, C = 9, 20


def arguments(device="cpu", dtype=torch.float32, **changes) -> dict:
    kw = {name: torch.randn(T, C, device=device).to(dtype) for name in ("x", "branch")}
    return kw | {name: torch.randn(C, device=device).to(dtype) for name in ("weight", "bias")} | changes


def step(op, kw: dict) -> dict:
    """The output and every gradient, for a cotangent of a fixed seed."""
    leaves = {
        n: t.detach().requires_grad_() for n, t in kw.items() if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    y = op(**(kw | leaves))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, tuple(leaves.values()), dy)
    return {"dy": dy, "y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_rule(op, kw: dict, backend: str) -> None:
    with use_backend(backend):
        got = step(op, kw)
    with use_backend("reference"):
        usual, exact = step(op, kw), step(op, {n: compare.doubled(v) for n, v in kw.items()})
    for name, truth in exact.items():
        if name != "dy":
            error = compare.beside(name, got[name], usual[name], truth)
            assert error.ok, str(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_the_documented_one(backend, device):
    """A branch of ones shows the mask, forward and backward: element (row, column) of keep_mask."""
    kw = arguments(device, p=0.4, seed=torch.tensor(7, device=device), norm="none", weight=None, bias=None)
    kw |= {"x": torch.zeros(T, C, device=device), "branch": torch.ones(T, C, device=device)}
    with use_backend(backend):
        found = step(norm_residual, kw)
    keep = keep_mask(kw["seed"], T, C, 0.4).float() * keep_factor(0.4)
    assert torch.equal(found["y"], keep)
    assert torch.equal(found["branch"], found["dy"] * keep) and torch.equal(found["x"], found["dy"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_is_drawn(backend, device):
    """Without a seed the mask follows torch's generator."""
    kw = arguments(device, p=0.5, backend=backend)
    torch.manual_seed(1)
    first, second = norm_residual(**kw), norm_residual(**kw)
    torch.manual_seed(1)
    assert torch.equal(norm_residual(**kw), first) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x, branch, weight", [("float32", "bfloat16", "float32"), ("bfloat16", "float16", "float32"),
                                               ("bfloat16", "float32", "bfloat16")])  # fmt: skip
def test_dtypes(x, branch, weight, backend, device):
    """Each in a dtype of its own: the wider of x and branch comes out, each gradient is its argument's."""
    dtypes = {"x": x, "branch": branch, "weight": weight, "bias": weight}
    kw = {n: t.to(getattr(torch, dtypes[n])) for n, t in arguments(device).items()}
    with use_backend(backend):
        found = step(norm_residual, kw)
    assert found["y"].dtype == torch.promote_types(kw["x"].dtype, kw["branch"].dtype)
    assert all(found[n].dtype == kw[n].dtype for n in dtypes)
    assert_rule(norm_residual, kw, backend)


@on_triton
def test_one_pass_each_way(device):
    """One launch forward; one backward beside the sums of the partial sums. No result shares memory with another."""
    kw = arguments(device, p=0.1, backend="triton")
    leaves = {n: kw[n].requires_grad_() for n in ("x", "branch", "weight", "bias")}
    with meter.launches() as counts:
        y = norm_residual(**kw)
        grads = torch.autograd.grad(y.sum(), tuple(leaves.values()))
    assert counts == {"norm_residual_fwd_kernel": 1, "norm_residual_bwd_kernel": 1}
    assert len(meter.storages((*grads, y, *leaves.values()))) == 9


@on_triton
def test_declines(device):
    kw = arguments(device, norm="none", weight=None, bias=None)
    decision = explain(norm_residual, **kw)
    assert decision.chosen == "reference" and "one addition" in decision.reason
    assert explain(norm_residual, **(kw | {"p": 0.1})).chosen == "triton"
    assert torch.equal(norm_residual(**kw, backend="triton"), norm_residual(**kw))
    with pytest.raises(backends.BackendRefused, match="9000 channels; kernels take up to 8192"):
        wide = torch.zeros(2, 9000, device=device)
        norm_residual(wide, wide, norm="layer", backend="triton")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"branch": torch.zeros(T, C + 1)}, "branch has shape \\(9, 21\\)"),
        ({"weight": torch.zeros(C + 1)}, "weight has shape \\(21,\\)"),
        ({"bias": torch.zeros(1, C)}, "bias has shape \\(1, 20\\)"),
        ({"norm": "batch"}, "norm is 'batch'; accepted: none, layer, rms"),
        ({"norm": "none"}, 'norm is "none", yet weight or bias'),
        ({"norm": "rms"}, "bias is given; RMSNorm has none"),
        ({"p": 1.0}, "p is 1.0"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is torch.int64 \\(2,\\)"),
        ({"x": torch.zeros(T, C, dtype=torch.int32)}, "x has dtype torch.int32"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        norm_residual(**(arguments() | changes))


# -- mlp_projector ---------------------------------------------------------------------------------------------------


def mlp(device, dtype, bias: bool, norm: str, wide_x: bool = False, **changes) -> dict:
    inner = 24
    kw = {
        "x": torch.randn(3, T, C, device=device),
        "w1": torch.randn(inner, C, device=device) * C**-0.5,
        "w2": torch.randn(C, inner, device=device) * inner**-0.5,
        "b1": torch.randn(inner, device=device) if bias else None,
        "b2": torch.randn(C, device=device) if bias else None,
        "norm_weight": torch.randn(C, device=device) if norm != "none" else None,
    }
    kw = {n: t if t is None or (wide_x and n == "x") else t.to(dtype) for n, t in kw.items()}
    return kw | {"norm": norm, "residual": True, "dtype": dtype} | changes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("wide_x", [False, True])
def test_mlp_residual(wide_x, norm, bias, backend, device):
    """With x in the compute dtype and wider: the sum is in the wider of both, and x's gradient is whole."""
    kw = mlp(device, torch.bfloat16, bias, norm, wide_x)
    y = mlp_projector(**kw, backend=backend)
    assert y.dtype == kw["x"].dtype and y.shape == kw["x"].shape
    with use_backend(backend):
        got = step(mlp_projector, kw)
    with use_backend("reference"):
        usual = step(mlp_projector, kw)
        exact = step(mlp_projector, {n: compare.doubled(v) for n, v in kw.items()} | {"dtype": torch.float64})
    for name in ("y", "x"):
        error = compare.beside(name, got[name], usual[name], exact[name], torch.bfloat16)
        assert error.ok, str(error)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"w2": torch.zeros(C + 1, 24), "b2": None}, "adds x with 20 channels to 21"),
        ({"merge": 3, "w1": torch.zeros(24, 3 * C)}, "merge 3; accepted: equal widths"),
        ({"x": torch.zeros(1, 2, 2, 5), "shuffle": 2, "w2": torch.zeros(5, 24), "b2": None}, "shuffle is 2"),
    ],
)
def test_mlp_residual_refused(changes, message):
    kw = mlp("cpu", torch.float32, True, "none", norm_weight=None)
    with pytest.raises(ValueError, match=message):
        mlp_projector(**(kw | changes))


@on_triton
@pytest.mark.parametrize(
    "dtype, depth, gated, own",
    [("bfloat16", 40, False, True), ("float16", 40, False, True), ("float32", 40, False, False),
     ("bfloat16", 40, True, False), ("bfloat16", 2064, False, False)],
)  # fmt: skip
@pytest.mark.parametrize("level", [0, 1])
def test_mlp_first_product(dtype, depth, gated, own, level, device):
    """In 16 bits and up to 2048 columns product and activation are one launch, without a gate; else two."""
    dtype = getattr(torch, dtype)
    x, w1 = (torch.randn(*s, device=device).to(dtype) * depth**-0.25 for s in ((5, depth), (48, depth)))
    w2 = torch.randn(8, 24 if gated else 48, device=device).to(dtype)
    with meter.traffic() as traffic:
        y = mlp_projector(x, w1, w2, gated=gated, level=level, backend="triton")
    assert traffic.launches["mlp_projector_gemm_act_kernel"] == own
    assert traffic.launches["mlp_projector_act_kernel"] == (not own)
    assert traffic.launches["aten::mm"] == 2 - own
    want = mlp_projector(x, w1, w2, gated=gated, backend="reference")
    exact = mlp_projector(x.double(), w1.double(), w2.double(), gated=gated, backend="reference")
    error = compare.beside("y", y, want, exact)
    assert error.ok, str(error)


def test_reference_is_the_sum():
    """The residual is x itself, not its norm, in float64."""
    kw = {n: compare.doubled(v) for n, v in mlp("cpu", torch.float32, True, "rms").items()} | {"dtype": None}
    n = F.rms_norm(kw["x"], (C,), kw["norm_weight"], 1e-5)
    y = kw["x"] + F.linear(F.gelu(F.linear(n, kw["w1"], kw["b1"])), kw["w2"], kw["b2"])
    error = compare.worst(mlp_projector(**kw), y)[0]
    assert error <= 24 * compare.ulp(float(y.abs().max()), torch.float64)
