"""multi_layer_kv: the identities that its kernels rest on, what they launch, and what the door refuses."""

import os

import pytest
import torch
import torch.nn.functional as F

from vlkernels import backends, explain, multi_layer_kv, use_backend
from vlkernels.ops._shuffle import normalised
from vlkernels.testing import compare, meter
from vlkernels.testing.compare import ulp

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
T, C, L, W = 45, 36, 3, 20
TRAINED = ("x", "weight", "bias", "norm_weight", "norm_bias")


def arguments(norm: str, dtype=torch.float64, device="cpu", **changes) -> dict:
    """x with a mean of its own in each row, so that a layer norm has something to take away."""
    kw = {
        "x": torch.randn(T, C, dtype=torch.float64) + torch.randn(T, 1, dtype=torch.float64),
        "weight": torch.randn(L * W, C, dtype=torch.float64) * C**-0.5,
        "bias": torch.randn(L * W, dtype=torch.float64),
        "norm_weight": torch.randn(L, C, dtype=torch.float64) if norm != "none" else None,
        "norm_bias": torch.randn(L, C, dtype=torch.float64) if norm == "layer" else None,
    }
    kw = {n: t if t is None else t.to(device, dtype) for n, t in kw.items()}
    return kw | {"layers": L, "norm": norm} | changes


def leaves_of(kw: dict, names=TRAINED) -> dict:
    return {n: kw[n].detach().requires_grad_() for n in names if kw[n] is not None}


def step(kw: dict, dy, names=TRAINED) -> dict:
    """The output and the gradient of every named argument."""
    leaves = leaves_of(kw, names)
    y = multi_layer_kv(**(kw | leaves))
    grads = torch.autograd.grad(y, tuple(leaves.values()), dy.to(y))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def by_identities(kw: dict, dy) -> dict:
    """The docstring of the reference: one norm, one product, one weight-gradient product, one norm backward."""
    x, weight, bias, norm_weight, norm_bias = (kw[n] for n in TRAINED)
    norm, n = kw["norm"], normalised(kw["x"], kw["norm"], None, None, 1e-5)
    w, g = weight.view(L, W, C), norm_weight[:, None]
    b = torch.zeros(L, C, dtype=x.dtype) if norm_bias is None else norm_bias
    folded = (w * g).view(L * W, C)
    y = F.linear(n, folded, torch.einsum("lwc,lc->lw", w, b).flatten() + bias)
    G, d = (dy.t() @ n).view(L, W, C), dy.sum(0).view(L, W)
    grads = {
        "weight": (G * g + d[..., None] * b[:, None]).view(L * W, C),
        "bias": d.flatten(),
        "norm_weight": (w * G).sum(1),
    }
    if norm_bias is not None:
        grads["norm_bias"] = torch.einsum("lw,lwc->lc", d, w)
    dn = dy @ folded
    rstd = torch.rsqrt((x.var(-1, correction=0, keepdim=True) if norm == "layer" else x.square().mean(-1, True)) + 1e-5)
    level = dn.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return {"y": y, "x": rstd * (dn - level - n * (dn * n).mean(-1, keepdim=True))} | grads


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_identities(norm):
    """The folded form and its gradients are autograd's through a norm and a linear in each layer, to float64's eps.

    Both sides round each of their sums' terms; no sum here is longer than `terms`.
    """
    kw, dy, terms = arguments(norm), torch.randn(T, L * W, dtype=torch.float64), max(T, C, L * W)
    with use_backend("reference"):
        want = step(kw, dy)
    got = by_identities(kw, dy)
    assert set(got) == set(want)
    for name, truth in want.items():
        error, where = compare.worst(got[name], truth)
        limit = terms * ulp(float(truth.abs().max()), torch.float64)
        assert error <= limit, f"{name}: {error} at {where}, limit {limit}"
        # the bound sees a term that is missing
        assert compare.worst(0.999 * got[name], truth)[0] > limit, name


@on_triton
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(norm, dtype, device):
    """A transposed weight, scales and shifts cut from a table and a batched x that is a slice."""
    dy = torch.randn(5, 9, L * W, dtype=torch.float64, device=device).to(dtype)
    kw = arguments(norm, dtype, device)
    kw["weight"] = kw["weight"].t().contiguous().t()
    kw["x"] = torch.cat((kw["x"], kw["x"]), -1).view(5, 9, 2 * C)[..., C:]
    for name in ("norm_weight", "norm_bias"):
        kw[name] = kw[name] if kw[name] is None else torch.cat((kw[name], kw[name]), -1)[:, C:]
    with use_backend("triton"):
        got = step(kw, dy)
    with use_backend("reference"):
        usual = step(kw, dy)
        exact = step({n: compare.doubled(v) for n, v in kw.items()}, dy)
    for name, truth in exact.items():
        error = compare.beside(name, got[name], usual[name], truth)
        assert error.ok, str(error)


def counted(kw: dict, names: tuple[str, ...]) -> tuple:
    """Launches of forward and backward on Triton when these arguments get gradients."""
    with meter.traffic() as forward:
        y = multi_layer_kv(**(kw | leaves_of(kw, names)), backend="triton")
    with meter.traffic() as backward:
        y.backward(torch.ones_like(y))
    return forward.launches, backward.launches


def products(launches) -> int:
    return launches["aten::mm"] + launches["aten::addmm"]


@on_triton
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_frozen_x(norm, device):
    """Over a frozen tower: one product forward, one weight-gradient product backward, and no norm backward."""
    forward, backward = counted(arguments(norm, torch.float32, device), TRAINED[1:])
    assert products(forward) == 1 and products(backward) == 1
    assert forward["shuffle_norm_fwd_kernel"] == backward["shuffle_norm_fwd_kernel"] == 1
    assert forward["multi_layer_kv_fold_kernel"] == backward["multi_layer_kv_unfold_kernel"] == 1
    assert not backward["shuffle_norm_bwd_kernel"] and not backward["multi_layer_kv_fold_kernel"]


@on_triton
def test_trained_x(device):
    """One product and one norm backward more, for all layers together."""
    forward, backward = counted(arguments("layer", torch.float32, device), TRAINED)
    assert products(forward) == 1 and products(backward) == 2
    assert backward["shuffle_norm_bwd_kernel"] == backward["multi_layer_kv_unfold_kernel"] == 1


@on_triton
@pytest.mark.parametrize(
    "names, most",
    [(("x",), 1), (("norm_bias",), 0), (("bias",), 0), (("norm_weight",), 1), (("weight",), 1), (("x", "bias"), 1)],
)
def test_only_what_is_needed(names, most, device):
    """Gradients that nobody asked for cost no product; those asked for are right."""
    kw, dy = arguments("layer", torch.float32, device), torch.randn(T, L * W, device=device)
    assert products(counted(kw, names)[1]) == most
    with use_backend("triton"):
        got = step(kw, dy, names)
    with use_backend("reference"):
        usual, exact = (step(k, dy, names) for k in (kw, {n: compare.doubled(v) for n, v in kw.items()}))
    for name, truth in exact.items():
        error = compare.beside(name, got[name], usual[name], truth)
        assert error.ok, str(error)


@on_triton
def test_declines(device):
    """One layer without a norm is a linear; the reason is told, and forcing the kernels still works."""
    kw = arguments("none", torch.float32, device, layers=1)
    decision = explain(multi_layer_kv, **kw)
    assert decision.chosen == "reference" and "one linear" in decision.reason
    assert explain(multi_layer_kv, **(kw | {"layers": L})).chosen == "triton"
    assert torch.equal(multi_layer_kv(**kw, backend="triton"), multi_layer_kv(**kw))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 7}, "layers is 7, weight has 60 rows"),
        ({"layers": 0}, "layers is 0"),
        ({"norm": "batch"}, "norm is 'batch'; accepted: none, layer, rms"),
        ({"norm": "none"}, 'norm is "none", yet norm_weight'),
        ({"norm": "rms"}, "norm_bias is given; RMSNorm has none"),
        ({"weight": torch.zeros(L * W, C + 1, dtype=torch.float64)}, "weight \\(60, 37\\)"),
        ({"bias": torch.zeros(W, dtype=torch.float64)}, "bias has shape \\(20,\\)"),
        ({"norm_weight": torch.zeros(C, dtype=torch.float64)}, "norm_weight has shape \\(36,\\)"),
        ({"norm_bias": torch.zeros(L + 1, C, dtype=torch.float64)}, "norm_bias has shape \\(4, 36\\)"),
        ({"weight": torch.zeros(L * W, C)}, "weight has dtype torch.float32, x has torch.float64"),
        ({"x": torch.zeros(T, C, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        multi_layer_kv(**(arguments("layer") | changes))


@on_triton
def test_refusals(device):
    """What no kernel takes is an error when it is forced, with its reason."""
    kw = arguments("layer", torch.float32, device)
    wide = {"x": torch.zeros(2, 9000, device=device), "weight": torch.zeros(L, 9000, device=device), "bias": None}
    for changes, message in (
        ({n: compare.doubled(v) for n, v in kw.items()}, "x is torch.float64"),
        (wide | {"norm_weight": None, "norm_bias": None}, "9000 channels to normalise"),
        ({"weight": kw["weight"][:0], "bias": kw["bias"][:0]}, "zero channels"),
    ):
        with pytest.raises(backends.BackendRefused, match=message):
            multi_layer_kv(**(kw | changes), backend="triton")


def test_baselines_compute_the_op():
    """What benchmarks compare with is the same computation; the layers alone are what the op gives, split."""
    from benchmarks import providers
    from vlkernels.testing.case import PRECISIONS, Make

    cases = compare.cases_of(multi_layer_kv)
    case = next(c for c in cases.CASES if "sharp" in c.tags)
    kw = cases.inputs(case, Make(PRECISIONS["fp32"]))
    want = multi_layer_kv(**kw, backend="reference")
    for name in ("layers", "eager"):
        y = providers.named(multi_layer_kv, name).build(case, kw, PRECISIONS["fp32"]).forward()
        assert torch.equal(y if name == "eager" else torch.cat(y, -1), want)
    assert providers.baseline_of(multi_layer_kv) == "layers"
