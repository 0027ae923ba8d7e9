"""cross_attention: its identities in float64, what it does with nothing to see, and its front door."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from vlkernels import cross_attention, explain
from vlkernels.ops.cross_attention import triton as kernels
from vlkernels.testing import compare, meter

torch.set_num_threads(1)
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")


def heads(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def sources(dtype=torch.float64, B=2, M=5, N=7, N2=6, H=4, G=2, K=6):
    q = heads(B, M, H, K, dtype=dtype)
    k, v = (heads(B, N, G, K, seed=s, dtype=dtype) for s in (1, 2))
    k2, v2 = (heads(B, N2, G, K, seed=s, dtype=dtype) for s in (3, 4))
    return q, k, v, k2, v2


def close(got, want):
    """Equal but for float64's rounding of sums."""
    scale = float(want.detach().abs().max())
    assert compare.worst(got, want)[0] <= 2**6 * torch.finfo(torch.float64).eps * scale


def gradients(y, leaves):
    return torch.autograd.grad((y * heads(*y.shape, seed=9)).sum(), leaves)


def leaves_of(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def same(build_a, build_b, *tensors):
    """Outputs and gradients of two ways to compute the same."""
    results = []
    for build in (build_a, build_b):
        leaves = leaves_of(*tensors)
        y = build(*leaves)
        results.append((y, *gradients(y, leaves)))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_two_sources_are_their_concatenation():
    """And torch's attention, with grouped heads."""

    def joined(q, k, v, k2, v2):
        k, v = torch.cat((k, k2), 1), torch.cat((v, v2), 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    same(cross_attention, joined, *sources())


def test_two_sources_are_a_merge_of_two_softmaxes():
    """y = Σ_s exp(lse_s - lse) y_s, what a split over the keys computes."""
    q, k, v, k2, v2 = sources(G=4)
    parts = [cross_attention(q, *pair) for pair in ((k, v), (k2, v2))]
    lse = [(torch.einsum("bmhk,bnhk->bmhn", q, t) * q.shape[3] ** -0.5).logsumexp(-1, keepdim=True) for t in (k, k2)]
    whole = torch.logaddexp(*lse)
    close(sum(p * (part - whole).exp() for p, part in zip(parts, lse, strict=True)), cross_attention(q, k, v, k2, v2))


def test_index_is_a_gather():
    q, k, v, *_ = sources(B=5)
    k, v, index, mask = k[:3], v[:3], torch.tensor([2, 0, 2, 1, 0]), torch.rand(3, 7) > 0.3
    same(
        lambda q, k, v: cross_attention(q, k, v, mask=mask, index=index),
        lambda q, k, v: cross_attention(q, k[index], v[index], mask=mask[index]),
        q, k, v,
    )  # fmt: skip


def test_a_batch_of_one_serves_all():
    """Queries and latents that are the same for all images, as in a resampler's first layer."""
    q, k, v, k2, v2 = sources(B=3)
    same(
        lambda q, k2, v2: cross_attention(q, k, v, k2, v2),
        lambda q, k2, v2: cross_attention(q.expand(3, -1, -1, -1), k, v, *(t.expand(3, -1, -1, -1) for t in (k2, v2))),
        q[:1], k2[:1], v2[:1],
    )  # fmt: skip


def test_projection_inside():
    """Level 1: keys and values from x, neither kept."""
    q, *_ = sources(G=2)
    x, weight, bias = heads(2, 7, 10), heads(24, 10), heads(24)

    def outside(q, x, weight, bias):
        k, v = F.linear(x, weight, bias).view(2, 7, 2, 2, 6).unbind(2)
        return cross_attention(q, k, v)

    same(lambda q, x, w, b: cross_attention(q, x=x, kv_weight=w, kv_bias=b), outside, q, x, weight, bias)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_nothing_to_see(backend):
    """No visible key: the mean of all values as transformers gives it, or 0 with -inf; no NaN, also in gradients."""
    q, k, v, *_ = (t.float() for t in sources(G=4))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0] = False
    for masked in (torch.finfo(torch.float32).min, -math.inf, -10000.0):
        leaves = leaves_of(q, k, v)
        y = cross_attention(*leaves, mask=mask, masked=masked, backend=backend)
        for t in (y, *torch.autograd.grad(y.sum(), leaves)):
            assert t.isfinite().all()
        # transformers' eager attention: the mask is added, softmax in float32
        added = torch.zeros(2, 7).masked_fill(~mask, masked)[:, None, None]
        usual = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), added).transpose(1, 2)
        exact = cross_attention(q.double(), k.double(), v.double(), mask=mask, masked=masked)
        if masked == -math.inf:
            assert not y[0].any()
        elif masked < -1e30:
            assert compare.beside("mean", y[0, 1], v[0].mean(0), v[0].double().mean(0)).ok
        else:
            assert compare.beside("shifted", y, usual, exact).ok
        assert compare.beside("others", y[1], usual[1], exact[1]).ok


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_keys(backend):
    """Sources without a key give 0, and queries without a row give none."""
    q, k, v, k2, v2 = (t.float() for t in sources())
    assert not cross_attention(q, k[:, :0], v[:, :0], backend=backend).any()
    close(
        cross_attention(q, k[:, :0], v[:, :0], k2, v2, backend=backend).double(),
        cross_attention(q, k2, v2, backend=backend).double(),
    )
    assert cross_attention(q[:, :0], k, v, backend=backend).shape == (2, 0, 4, 6)


def test_causal_cache():
    """The last queries of a longer text see what they see in one pass over all of it."""
    q, k, v, k2, v2 = sources(M=6)
    whole = cross_attention(q, k, v, k2, v2, causal=True)
    close(cross_attention(q[:, 4:], k, v, k2, v2, causal=True), whole[:, 4:])
    close(cross_attention(q[:, :1], k, v, k2[:, :1], v2[:, :1]), whole[:, :1])


@interpreted
def test_flash():
    """Where torch's FlashAttention computes the forward, the kernels' backward follows from its denominators."""
    make = lambda *shape, seed: heads(*shape, seed=seed, dtype=torch.float32).bfloat16()  # noqa: E731
    q, k, v = make(1, 9, 2, 16, seed=0), make(2, 40, 2, 16, seed=1), make(2, 40, 2, 16, seed=2)

    def run(dtype, backend):
        leaves = leaves_of(*(t.to(dtype) for t in (q, k, v)))
        y = cross_attention(*leaves, backend=backend)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    with mock.patch.object(kernels, "by_flash", lambda *_: True), meter.launches() as counts:
        got = run(torch.bfloat16, "triton")
        assert "FlashAttention" in dict(explain(cross_attention, q, k, v).answers)["triton"]
    assert "cross_attention_fwd_kernel" not in counts and "cross_attention_bwd_kernel" in counts
    for name, *ts in zip(
        ["y", "q", "k", "v"], got, run(torch.bfloat16, "reference"), run(torch.float64, "reference"), strict=True
    ):
        found = compare.beside(name, *ts)
        assert found.ok, str(found)
    assert kernels.by_flash(True, 256, 32, 32, 128, torch.bfloat16, "cuda")
    for change in ({"plain": False}, {"M": 64}, {"G": 8}, {"K": 12}, {"dtype": torch.float32}, {"device": "cpu"}):
        fits = {"plain": True, "M": 256, "H": 32, "G": 32, "K": 128, "dtype": torch.bfloat16, "device": "cuda"}
        assert not kernels.by_flash(**(fits | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": heads(2, 5, 4)}, "q has shape"),
        ({"v": None}, "k and v"),
        ({"k": None, "v": None, "k2": None, "v2": None}, "neither beside k2"),
        ({"x": heads(2, 7, 10), "kv_weight": heads(24, 10)}, "k and v, or x"),
        ({"k": heads(2, 7, 3, 6), "v": heads(2, 7, 3, 6)}, "a multiple of G"),
        ({"k": heads(2, 7, 2, 5), "v": heads(2, 7, 2, 5)}, "accepted for q"),
        ({"v": heads(2, 8, 2, 6)}, "equal ones go"),
        ({"k2": heads(2, 6, 4, 6), "v2": heads(2, 6, 4, 6)}, "one number G"),
        ({"k2": heads(3, 6, 2, 6), "v2": heads(3, 6, 2, 6)}, "batch sizes differ"),
        ({"mask": torch.ones(2, 7)}, "mask is torch.float32"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask is torch.bool"),
        ({"mask": torch.ones(3, 7, dtype=torch.bool)}, "batch sizes differ"),
        ({"bias": heads(2, 3, 5, 7)}, "bias has shape"),
        ({"bias": heads(1, 1, 5, 7).requires_grad_()}, "bias requires a gradient"),
        ({"index": torch.tensor([0, 2])}, "index reaches from 0 to 2"),
        ({"index": torch.tensor([0.0, 1.0])}, "index is torch.float32"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"q_norm_weight": heads(6)}, "given with norm='none'"),
        ({"norm": "rms", "k_norm_bias": heads(6)}, "given with norm='rms'"),
        ({"p": 1.0}, "dropout probability"),
        ({"seed": torch.tensor([1])}, "seed is"),
        ({"masked": 0.0}, "masked is 0.0"),
        ({"masked": math.nan}, "masked is nan"),
        ({"scale": -1.0}, "scale is"),
        ({"causal": True, "k2": None, "v2": None}, "causal orders"),
        ({"kv_bias": heads(24)}, "kv_bias is given without x"),
    ],
)
def test_front_door(change, message):
    kw = dict(zip(("q", "k", "v", "k2", "v2"), sources(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        cross_attention(**kw)


def test_front_door_dtypes():
    q, k, v, *_ = sources()
    with pytest.raises(TypeError, match="they must agree"):
        cross_attention(q.float(), k, v)
    with pytest.raises(TypeError, match="has dtype torch.int64"):
        cross_attention(q.long(), k, v)


@interpreted
def test_too_wide_a_head():
    q, k, v = (torch.randn(1, 3, 1, 136) for _ in range(3))
    answers = dict(explain(cross_attention, q, k, v).answers)
    assert "head dim 136; kernels take up to 128" in answers["triton"]
