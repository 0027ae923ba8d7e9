"""depthwise_conv_norm_act, conv_se_linear and pooled_mlp: what their cases do not say."""

import dataclasses
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from vlkernels import backends, conv_se_linear, depthwise_conv_norm_act, explain, pooled_mlp, use_backend
from vlkernels.ops.conv_se_linear import cases as se_cases
from vlkernels.ops.conv_se_linear import kernels as se_kernels
from vlkernels.ops.depthwise_conv_norm_act import cases as conv_cases
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
B, H, W, C = 2, 4, 3, 12


def arguments(device="cpu", dtype=torch.float32, **changes) -> dict:
    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    kw = {"x": normal(B, H * W, C), "weight": normal(C, 1, 3, 3), "h": H, "w": W, "bias": normal(C)}
    return kw | {"norm_weight": normal(C), "norm_bias": normal(C), "act": "silu", "means": True} | changes


def se_arguments(**changes) -> dict:
    case = next(c for c in se_cases.CASES if "sharp" in c.tags)
    kw = se_cases.inputs(case, Make(PRECISIONS["fp32"]))
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in kw.items()} | changes


def pooled_arguments(**changes) -> dict:
    shapes = {"x": (B, H * W, C), "w1": (8, C), "w2": (6, 8), "b1": (8,), "b2": (6,)}
    kw = {n: torch.randn(*shape) for n, shape in shapes.items()}
    return kw | {"h": H, "w": W, "out_h": 2, "out_w": 2} | changes


def gradients(op, kw: dict, cotangents) -> dict:
    """Of sum(output * cotangent) for the outputs that have one."""
    leaves = {n: t.detach().requires_grad_() for n, t in kw.items() if isinstance(t, torch.Tensor)}
    out = op(**(kw | leaves))
    out = (out,) if isinstance(out, torch.Tensor) else out
    chosen = [(y, dy(y)) for y, dy in zip(out, cotangents, strict=True) if dy is not None]
    grads = torch.autograd.grad([y for y, _ in chosen], tuple(leaves.values()), [dy for _, dy in chosen])
    return dict(zip(leaves, grads, strict=True))


def drawn(y):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def expanded(y):
    """As the gradient of a sum: one number for all, with strides of 0."""
    return torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)


@on_triton
@pytest.mark.parametrize("cotangents", [(drawn, None), (None, drawn), (expanded, expanded)])
def test_gradients_through_either_result(cotangents, device):
    kw = arguments(device)
    found = {}
    for name, backend, given in (
        ("got", "triton", kw),
        ("usual", "reference", kw),
        ("exact", "reference", {n: compare.doubled(t) for n, t in kw.items()}),
    ):
        with use_backend(backend):
            found[name] = gradients(depthwise_conv_norm_act, given, cotangents)
    # the gradient of a sum through a norm is zero in exact arithmetic: the largest one has the scale
    top = max(float(exact.abs().max()) for exact in found["exact"].values())
    for name, exact in found["exact"].items():
        error, usual = (compare.worst(found[which][name], exact)[0] for which in ("got", "usual"))
        assert error <= 2 * usual + 4 * compare.ulp(top, torch.float32), name


@on_triton
@pytest.mark.parametrize("op, kw", [(depthwise_conv_norm_act, arguments), (conv_se_linear, se_arguments)])
def test_levels_give_the_same_numbers(op, kw):
    """What level 1 computes again is what level 0 kept, to the bit, and level 1 keeps less."""
    kept = []
    for level in (0, 1):
        given = kw(level=level)
        leaves = {n: t.requires_grad_() for n, t in given.items() if isinstance(t, torch.Tensor)}
        with use_backend("triton"):
            torch.manual_seed(0)
            kept.append(meter.saved_bytes(lambda: op(**given), apart=leaves.values()))  # noqa: B023
    torch.manual_seed(1)
    given = kw()
    with use_backend("triton"):
        count = 2 if op is depthwise_conv_norm_act else 1
        first, second = (gradients(op, given | {"level": level}, (drawn,) * count) for level in (0, 1))
    assert kept[1] < kept[0] and all(torch.equal(first[n], second[n]) for n in first)


@on_triton
def test_one_read_and_one_write(device):
    """Forward is one launch, which reads x once and writes y once; the means are a sum of partial sums after it."""
    kw = arguments(device, level=1, x=torch.randn(4, 64, 64, device=device), h=8, w=8)
    kw |= {"weight": torch.randn(64, 1, 3, 3, device=device)} | dict.fromkeys(("bias", "norm_weight", "norm_bias"))
    with meter.traffic() as forward:
        y, _ = depthwise_conv_norm_act(**kw, backend="triton")
    kernel = forward.moved_by["depthwise_fwd_kernel"]
    # beside the map twice: nine weights, the statistics, the partial sums
    assert forward.launches["depthwise_fwd_kernel"] == 1 and 2 * y.nbytes < kernel < 1.1 * 2 * y.nbytes
    assert set(forward.launches) == {"depthwise_fwd_kernel", "aten::sum", "aten::mul_"}


@on_triton
def test_the_product_of_scaled_rows(device):
    """Triton's own and cuBLAS's of rows that were scaled before give the same, where the width chooses either."""
    y, scale = torch.randn(2, 9, 24, device=device).bfloat16(), torch.randn(2, 24, device=device).bfloat16()
    weight = torch.randn(20, 24, device=device).bfloat16()
    exact = ((y * scale[:, None]).double() @ weight.double().t()).view(18, 20)
    usual = (y * scale[:, None]).view(18, 24) @ weight.t()
    with meter.launches() as counts:
        own = se_kernels.scaled_product(y, scale, weight)
    assert counts == {"conv_se_linear_product_kernel": 1}
    with mock.patch.object(se_kernels, "product_config", lambda *_: None):
        assert torch.equal(se_kernels.scaled_product(y, scale, weight), usual)
    error = compare.beside("d", own, usual, exact)
    assert error.ok, str(error)
    assert se_kernels.product_config(9216, 1024, 1024, torch.bfloat16).cols == 128
    assert se_kernels.product_config(9216, 4096, 4096, torch.bfloat16) is None
    assert se_kernels.product_config(9216, 1024, 1024, torch.float32) is None


def test_reference_is_the_convolution_channels_first():
    kw = {n: compare.doubled(t) for n, t in arguments(stride=2, act="hardswish").items()}
    y, means = depthwise_conv_norm_act(**kw, backend="reference")
    image = kw["x"].transpose(1, 2).view(B, C, H, W)
    want = F.conv2d(image, kw["weight"], kw["bias"], 2, 1, groups=C).permute(0, 2, 3, 1).reshape(B, 4, C)
    want = F.hardswish(F.layer_norm(want, (C,), kw["norm_weight"], kw["norm_bias"]))
    assert (y - want).abs().max() <= 64 * compare.ulp(float(want.abs().max()), torch.float64)
    assert (means - want.mean(1)).abs().max() <= 64 * compare.ulp(float(want.abs().max()), torch.float64)


@on_triton
def test_too_many_channels_run_plain(device):
    x = torch.zeros(1, 1, 4100, device=device)
    weight = torch.zeros(4100, 1, 3, 3, device=device)
    decision = explain(depthwise_conv_norm_act, x, weight, 1, 1)
    assert decision.chosen == "reference" and "4100 channels to normalise; kernels take up to 4096" in decision.reason
    assert explain(depthwise_conv_norm_act, x, weight, 1, 1, norm="none").chosen == "triton"
    with pytest.raises(backends.BackendRefused, match="4100 channels"):
        depthwise_conv_norm_act(x, weight, 1, 1, backend="triton")


def test_any_grid_fits_the_cases():
    """The memory report counts on fewer tokens than a map has."""
    case = next(c for c in conv_cases.CASES if "bench" in c.tags)
    for rows in (64, 72, 7, 576 * 3):
        few = dataclasses.replace(case, dims={**case.dims, "T": rows})
        images, h, w = conv_cases.grid(few)
        assert images * h * w == rows


BAD = [
    (depthwise_conv_norm_act, arguments, changes, says)
    for changes, says in (
        ({"x": torch.zeros(B, 11, C)}, r"x has shape \(2, 11, 12\); .* 4 x 3 = 12 tokens"),
        ({"x": torch.zeros(H * W, C)}, r"accepted: \(B, h w, C\)"),
        ({"h": 0}, "h is 0, w is 3; accepted: 1 or more"),
        ({"w": -3}, "w is -3"),
        ({"weight": torch.zeros(C, 1, 5, 5)}, r"weight has shape \(12, 1, 5, 5\); accepted: \(C, 1, 3, 3\)"),
        ({"weight": torch.zeros(C + 1, 1, 3, 3)}, r"weight has shape \(13, 1, 3, 3\)"),
        ({"bias": torch.zeros(C + 1)}, r"bias has shape \(13,\)"),
        ({"norm_weight": torch.zeros(1, C)}, r"norm_weight has shape \(1, 12\)"),
        ({"norm": "none"}, 'norm is "none", yet norm_weight'),
        ({"norm": "rms"}, "norm is 'rms'; accepted: none, layer"),
        ({"act": "tanh"}, "act is 'tanh'; accepted: none, silu, hardswish"),
        ({"stride": 3}, "stride is 3; accepted: 1, 2"),
        ({"stride": 2, "skip": True}, "skip=True adds x to a result of stride 2"),
        ({"level": 2}, "level is 2"),
        ({"x": torch.zeros(B, H * W, C, dtype=torch.float16)}, "they must agree"),
        ({"x": torch.zeros(B, H * W, C, dtype=torch.int64)}, "x has dtype torch.int64"),
    )
] + [
    (conv_se_linear, se_arguments, changes, says)
    for changes, says in (
        ({"h": 5}, "5 x 2 = 10 tokens"),
        ({"fc1_weight": torch.zeros(7, 23)}, r"fc1_weight has shape \(7, 23\); accepted: \(S, C\)"),
        ({"fc2_weight": torch.zeros(24, 6)}, r"fc2_weight has shape \(24, 6\)"),
        ({"fc1_bias": torch.zeros(6)}, r"fc1_bias has shape \(6,\)"),
        ({"weight": torch.zeros(20, 25)}, r"weight has shape \(20, 25\)"),
        ({"weight": torch.zeros(0, 24)}, r"weight \(0, 24\); accepted"),
        ({"out_norm_bias": torch.zeros(24)}, r"out_norm_bias has shape \(24,\); accepted: \(N,\)"),
        ({"shortcut": torch.zeros(5, 4, 24)}, r"shortcut has shape \(5, 4, 24\)"),
        ({"stride": 2}, r"shortcut has shape \(5, 4, 20\); accepted: \(B, h' w', N\)"),
        ({"gate": "tanh"}, "gate is 'tanh'; accepted: sigmoid, hardsigmoid"),
        ({"se_act": "gelu"}, "se_act is 'gelu'; accepted: silu, relu"),
        ({"out_act": "tanh"}, "out_act is 'tanh'"),
        ({"in_norm": False}, "in_norm is False, yet in_norm_weight"),
    )
] + [
    (pooled_mlp, pooled_arguments, changes, says)
    for changes, says in (
        ({"out_w": 0}, "out_h is 2, out_w is 0; accepted: 1 or more"),
        ({"w": 4}, "4 x 4 = 16 tokens"),
        ({"w1": torch.zeros(8, 11)}, r"w1 has shape \(8, 11\)"),
        ({"w2": torch.zeros(6, 9)}, r"w2 has shape \(6, 9\)"),
        ({"b2": torch.zeros(7)}, r"b2 has shape \(7,\)"),
        ({"act": "tanh"}, "act is 'tanh'"),
        ({"level": -1}, "level is -1"),
    )
]  # fmt: skip


@pytest.mark.parametrize("op, kw, changes, says", BAD)
def test_bad_arguments(op, kw, changes, says):
    with pytest.raises((ValueError, TypeError), match=says):
        op(**kw(**changes))
