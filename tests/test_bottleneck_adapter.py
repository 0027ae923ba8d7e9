"""bottleneck_adapter: what cases.py does not say."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vlkernels import backends, bottleneck_adapter, explain, use_backend
from vlkernels.ops._dropout import keep_factor, keep_mask
from vlkernels.ops.bottleneck_adapter.reference import ACTS
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
B, L, D, R = 3, 7, 24, 5
GATES = {"element": (B, L, D), "row": (B, L, 1), "sample": (B, 1, 1), "channel": (D,), "scalar": (1,)}


def arguments(make=None, E=0, biases=True, norm="none", gate=None, adds=(), rank=R, **options) -> dict:
    """Tensors that all get gradients; `options` are the op's own."""
    make = make or Make(PRECISIONS["fp32"], 0)
    kw = {
        "x": make.normal(B, L, D, grad=True),
        "down": make.normal(rank, D, std=D**-0.5, grad=True),
        "up": make.normal(D, max(1, E) * rank, std=rank**-0.5, grad=True),
        "down_bias": make.normal(rank, grad=True) if biases else None,
        "up_bias": make.normal(*((E, D) if E else (D,)), grad=True) if biases else None,
        "norm_weight": make.normal(D, grad=True) if norm != "none" else None,
        "norm_bias": make.normal(D, grad=True) if norm == "layer" else None,
        "gate": make.normal(*GATES[gate], grad=True) if gate else None,
        "route": make.normal(B, E, grad=True) if E else None,
        "seed": make.seed() if options.get("p") else None,
    }
    return kw | {name: make.normal(B, L, D, grad=True) for name in adds} | {"norm": norm, **options}


def assert_rule(make_arguments, precision, backend="triton") -> None:
    """Output and all gradients of the kernels obey the rule; baseline and scale over three seeds."""
    baseline, scale, truth, got = {}, {}, {}, {}
    for seed in range(3):
        kw = make_arguments(Make(precision, seed, "cpu", wide=True))
        exact = compare.exact(bottleneck_adapter, kw, precision, seed)
        usual = compare.run(bottleneck_adapter, kw, precision, "reference", seed)
        truth, got = (
            (exact, compare.run(bottleneck_adapter, kw, precision, backend, seed)) if seed == 0 else (truth, got)
        )
        for name, t in exact.items():
            baseline[name] = max(baseline.get(name, 0.0), compare.worst(usual[name], t)[0])
            scale[name] = max(scale.get(name, 0.0), float(t.abs().max()))
    for name, t in truth.items():
        limit = 2 * baseline[name] + 4 * compare.ulp(scale[name], got[name].dtype)
        error, where = compare.worst(got[name], t)
        assert error <= limit, f"{name}: error {error:.3g} at {where}, limit {limit:.3g}"


# -- what it computes ------------------------------------------------------------------------------------------------


def upstream_houlsby(kw):
    """adapter-hub: scaling * D(h) + h + r."""
    z = F.silu(F.linear(kw["x"], kw["down"], kw["down_bias"]))
    return F.linear(z, kw["up"], kw["up_bias"]) * kw["gate"] + kw["x"] + kw["residual"]


def upstream_vl_pet(kw):
    """VL-PET-large: residual + scale sigmoid(logits) * (h + up(gelu_new(down(h))))."""
    z = F.gelu(F.linear(kw["x"], kw["down"], kw["down_bias"]), approximate="tanh")
    branch = kw["x"] + F.linear(z, kw["up"], kw["up_bias"])
    return kw["residual"] + kw["scale"] * torch.sigmoid(kw["gate"]) * branch


def upstream_lavin(kw):
    """LaVIN: x + s w0 conv_B(a) + s w1 conv_D(a), a = conv_A(x)."""
    a, up0, up1 = F.linear(kw["x"], kw["down"], kw["down_bias"]), *kw["up"].split(R, 1)
    w0, w1 = (kw["route"][:, e, None, None] for e in range(2))
    bias0, bias1 = kw["up_bias"]
    return kw["x"] + kw["scale"] * w0 * F.linear(a, up0, bias0) + kw["scale"] * w1 * F.linear(a, up1, bias1)


def upstream_frozenbilm(kw):
    """FrozenBiLM without its dropout: x + up(relu(down(LN(x))))."""
    n = F.layer_norm(kw["x"], (D,), kw["norm_weight"], kw["norm_bias"], 1e-7)
    return kw["x"] + F.linear(F.relu(F.linear(n, kw["down"], kw["down_bias"])), kw["up"], kw["up_bias"])


UPSTREAM = [
    (upstream_houlsby, {"act": "silu", "gate": "scalar", "adds": ("residual",)}),
    (upstream_vl_pet, {"act": "gelu_tanh", "gate": "element", "gate_act": "sigmoid", "skip": "gated", "scale": 0.3,
                       "adds": ("residual",)}),
    (upstream_lavin, {"E": 2, "act": "none", "scale": 0.5}),
    (upstream_frozenbilm, {"norm": "layer", "eps": 1e-7}),
]  # fmt: skip


@pytest.mark.parametrize("upstream, options", UPSTREAM, ids=lambda v: getattr(v, "__name__", ""))
def test_is_what_upstream_writes(upstream, options):
    """Float64: output and every gradient of the system's own formulation."""
    kw = {n: compare.doubled(v) for n, v in arguments(**options).items()}
    leaves = [v for v in kw.values() if isinstance(v, torch.Tensor)]
    found, want = bottleneck_adapter(**kw), upstream(kw)
    dy = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True)
    for got, exact in ((found.detach(), want.detach()), *pairs):
        error = compare.worst(got, exact)[0]
        assert error <= 64 * compare.ulp(float(exact.abs().max()), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("E", [0, 3])
def test_mask_is_the_documented_one(backend, E):
    """Element (row, column) of keep_mask over z (T, R), the same for every expert."""
    rank = 12
    seed = torch.tensor(-7)
    keep = keep_mask(seed, B * L, rank, 0.4).float() * keep_factor(0.4)
    x, route = torch.zeros(B, L, rank), torch.ones(B, E) if E else None
    for e in range(max(1, E)):
        up = torch.zeros(rank, max(1, E) * rank)
        up[:, e * rank : (e + 1) * rank] = torch.eye(rank)
        y = bottleneck_adapter(
            x, torch.zeros(rank, rank), up, torch.ones(rank), route=route, seed=seed, act="none", skip="none", p=0.4,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(y.view(B * L, rank), keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_is_drawn(backend):
    """Without a seed the mask follows torch's generator, and checkpointing replays it."""
    kw = arguments(p=0.5, backend=backend) | {"seed": None}
    torch.manual_seed(1)
    first, second = bottleneck_adapter(**kw), bottleneck_adapter(**kw)
    torch.manual_seed(1)
    call = lambda x: bottleneck_adapter(**(kw | {"x": x}))  # noqa: E731
    again = checkpoint(call, kw["x"], use_reentrant=False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    plain, replayed = (torch.autograd.grad(y.sum(), kw["x"])[0] for y in (first, again))
    assert torch.equal(plain, replayed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_gate_is_the_identity(backend):
    """Zero-initialised, as MAGMA's scale or LaVIN's up may be: x bit for bit, and the branch still learns."""
    kw = arguments(biases=False, gate="scalar")
    kw["gate"] = torch.zeros(1, requires_grad=True)
    y = bottleneck_adapter(**kw, backend=backend)
    assert torch.equal(y, kw["x"])
    dgate, dup = torch.autograd.grad(y.square().sum(), (kw["gate"], kw["up"]))
    assert dgate.abs() > 0 and not dup.any()


# -- the kernels, over all that can be combined ----------------------------------------------------------------------

COMBINATIONS = [
    ("fp32", {"E": 2, "act": "none", "p": 0.25, "gate": "channel", "skip": "gated", "norm": "rms"}),
    ("bf16", {"E": 3, "gate": "element", "gate_act": "sigmoid", "norm": "layer", "adds": ("base",)}),
    ("fp32", {"gate": "channel", "gate_act": "sigmoid", "norm": "layer", "skip": "gated", "act": "quick_gelu"}),
    (
        "bf16",
        {"gate": "sample", "gate_act": "sigmoid", "skip": "gated", "scale": 0.6, "adds": ("residual",), "act": "gelu"},
    ),
    ("amp-bf16", {"gate": "element", "norm": "rms", "adds": ("base", "residual"), "p": 0.1, "scale": -2.0}),
    ("amp-bf16", {"E": 2, "gate": "sample", "norm": "layer", "act": "silu"}),
    ("fp16", {"biases": False, "gate": "scalar", "gate_act": "sigmoid", "skip": "gated", "act": "gelu_tanh"}),
    ("bf16+fp32", {"biases": False, "norm": "rms", "rank": 1}),
]


@on_triton
@pytest.mark.parametrize("plan", ["one kernel", "products"])
@pytest.mark.parametrize("precision, options", COMBINATIONS, ids=str)
def test_both_plans(precision, options, plan):
    """Every gate with every skip, routed or not, in one kernel a row tile and on cuBLAS products: the same rule."""
    kernels = bottleneck_adapter.kernels["triton"]
    with mock.patch.object(kernels, "fused", lambda up, dtype: plan == "one kernel"):
        assert_rule(lambda make: arguments(make, **options), PRECISIONS[precision])


@on_triton
@pytest.mark.parametrize("plan", ["one kernel", "products"])
@pytest.mark.parametrize("trained", [
    ("x",), ("up_bias",), ("down",), ("up",), ("norm_weight",), ("norm_bias",), ("down_bias",), ("gate",), ("base",),
    ("route",), ("x", "gate"), ("up_bias", "route"),
], ids=str)  # fmt: skip
def test_any_may_be_trained(trained, plan):
    """What is not asked for is not made, and what is has the value that it has when all are asked for."""
    kw = arguments(E=2, norm="layer", gate="channel", adds=("base",), skip="gated")
    kernels = bottleneck_adapter.kernels["triton"]
    with mock.patch.object(kernels, "fused", lambda up, dtype: plan == "one kernel"), use_backend("triton"):
        want = torch.autograd.grad(bottleneck_adapter(**kw).square().sum(), [kw[n] for n in trained])
        few = {n: v.detach().requires_grad_(n in trained) if isinstance(v, torch.Tensor) else v for n, v in kw.items()}
        got = torch.autograd.grad(bottleneck_adapter(**few).square().sum(), [few[n] for n in trained])
    for name, a, b in zip(trained, got, want, strict=True):
        assert torch.equal(a, b), name


@on_triton
def test_several_tiles_and_splits():
    """More rows than tiles and ranges of rows hold, and columns that no block divides."""
    kernels = bottleneck_adapter.kernels["triton"]
    found = kernels.config(kernels.Dims(21, 24, 24, 5), torch.float32, 0, torch.float32)
    assert found.outer_x.splits == 1

    def tight(*args):
        from dataclasses import replace

        tile = replace(found.forward, rows=16, cols=16, out=16)
        outer = replace(found.outer_x, rows=16, cols=16, splits=3)
        return kernels.Config(tile, tile, outer, outer)

    for options in ({"gate": "channel", "skip": "gated", "norm": "layer"}, {"E": 2, "gate": "element", "p": 0.2}):
        with mock.patch.object(kernels, "config", tight):
            assert_rule(lambda make, options=options: arguments(make, **options), PRECISIONS["fp32"])


@on_triton
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_of_a_large_mean(norm):
    """Rows whose mean is a hundred deviations: neither the statistics nor their gradient cancel."""

    def shifted(make):
        kw = arguments(make, norm=norm)
        return kw | {"x": (kw["x"].detach() + 100.0).requires_grad_()}

    assert_rule(shifted, PRECISIONS["fp32"])


@on_triton
def test_wide_down_and_up_are_read_by_their_strides():
    """Transposed weights, as a fan-in-first layer or Kronecker products give them, are not copied."""

    def turned(make):
        kw = arguments(make)
        return kw | {n: kw[n].detach().t().contiguous().t().requires_grad_() for n in ("down", "up")}

    assert_rule(turned, PRECISIONS["bf16"])


# -- what it costs ---------------------------------------------------------------------------------------------------


@on_triton
def test_launches():
    """One launch forward; backward the tile of rows, and a product and a sum of its parts for each weight."""
    kw = arguments(gate="channel", skip="gated", norm="layer", adds=("base", "residual"), p=0.1)
    with meter.launches() as counts:
        y = bottleneck_adapter(**kw, backend="triton")
    assert counts == {"bottleneck_adapter_fwd_kernel": 1}
    with meter.launches() as counts:
        y.sum().backward()
    assert counts == {
        "bottleneck_adapter_bwd_kernel": 1,
        "bottleneck_adapter_outer_kernel": 2,
        "bottleneck_adapter_finish_down_kernel": 1,
        "bottleneck_adapter_finish_up_kernel": 1,
    }


def eager(kw):
    """What upstream's modules run: each step a tensor."""
    n = kw["x"] if kw["norm_weight"] is None else F.layer_norm(kw["x"], (kw["x"].shape[-1],), kw["norm_weight"])
    z = ACTS[kw["act"]](F.linear(n, kw["down"], kw["down_bias"]))
    z = torch.native_dropout(z, kw["p"], True)[0] if kw["p"] else z
    b = F.linear(z, kw["up"], kw["up_bias"])
    b = b + kw["x"] if kw["skip"] == "gated" else b
    b = b if kw["gate"] is None else (torch.sigmoid(kw["gate"]) if kw["gate_act"] == "sigmoid" else kw["gate"]) * b
    return b + kw["x"] if kw["skip"] == "add" else b


SAVED = [
    # options, and at most so much of eager's bytes with x, and a gate of each element, counted on both sides
    ({"act": "relu", "p": 0.1}, 0.97),
    ({"act": "gelu_tanh", "gate": "scalar"}, 0.51),
    ({"act": "relu", "norm": "layer", "p": 0.1}, 0.51),
    ({"act": "gelu_tanh", "gate": "element", "gate_act": "sigmoid", "skip": "gated"}, 0.67),
]


@on_triton
@pytest.mark.parametrize("options, with_x", SAVED, ids=str)
def test_saved_bytes(options, with_x):
    """In bf16, 4096 channels and rank 64, a sixteenth of the width: nothing is kept but arguments and the seed.

    Beyond its arguments eager keeps the activations of rank width, and those of full width that norm, gate and scale
    need; we keep 8 bytes a call. x itself, which down's gradient needs on either side, is counted apart, and on both
    sides in the second figure (so is a gate of each element: we keep its logits, eager their sigmoid).
    """
    width, rank, rows = 256, 4, 24
    make = Make(PRECISIONS["bf16"], 0)
    kw = {"x": make.normal(1, rows, width, grad=True), "down": make.normal(rank, width, grad=True),
          "up": make.normal(width, rank, grad=True), "down_bias": make.normal(rank, grad=True),
          "up_bias": make.normal(width, grad=True), "norm_weight": None, "gate": None, "skip": "add", "p": 0.0,
          "gate_act": "none"} | options  # fmt: skip
    shape = {"element": (1, rows, width), "scalar": (1,)}.get(options.get("gate"))
    kw["gate"] = make.normal(*shape, grad=True) if shape else None
    kw["norm_weight"] = make.normal(width, grad=True) if "norm" in options else None
    apart = [v for v in kw.values() if isinstance(v, torch.Tensor)]
    ours = meter.saved_bytes(lambda: bottleneck_adapter(**kw, backend="triton"), apart)
    usual = meter.saved_bytes(lambda: eager(kw), apart)
    assert ours == (8 if kw["p"] else 0) and ours <= 0.15 * usual
    weights = [v for n, v in kw.items() if isinstance(v, torch.Tensor) and n not in ("x", "gate")]
    ours = meter.saved_bytes(lambda: bottleneck_adapter(**kw, backend="triton"), weights)
    usual = meter.saved_bytes(lambda: eager(kw), weights)
    assert ours <= with_x * usual


# -- the front door --------------------------------------------------------------------------------------------------


@on_triton
def test_plan_is_explained():
    kw = arguments()
    assert "one kernel for a tile of rows" in str(explain(bottleneck_adapter, **kw))
    wide = kw | {"down": torch.zeros(200, D), "up": torch.zeros(D, 200), "down_bias": None}
    assert "products on cuBLAS: 200 columns of z, one kernel holds 128" in str(explain(bottleneck_adapter, **wide))
    half = {n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in wide.items()}
    assert "one kernel for a tile of rows" in str(explain(bottleneck_adapter, **half))
    with pytest.raises(backends.BackendRefused, match="gate is torch.float64"):
        bottleneck_adapter(**(kw | {"gate": torch.ones(1, dtype=torch.float64)}), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 1, 3)], ids=str)
def test_any_leading_dims(lead, backend):
    kw = arguments()
    x = torch.randn(*lead, D)
    with use_backend(backend):
        y = bottleneck_adapter(**(kw | {"x": x, "gate": torch.randn(*lead, 1)}))
    assert y.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_in_a_wider_dtype(backend):
    """A float32 residual beside bf16 products comes out in float32, each gradient in its own dtype."""
    kw = arguments(Make(PRECISIONS["bf16"], 0), adds=("base",))
    kw["residual"] = torch.randn(B, L, D, requires_grad=True)
    y = bottleneck_adapter(**kw, backend=backend)
    y.sum().backward()
    assert y.dtype == torch.float32 and torch.equal(kw["residual"].grad, torch.ones(B, L, D))
    assert kw["base"].grad.dtype == kw["x"].grad.dtype == torch.bfloat16


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("changes, error, message", [
    ({"x": zeros(B, L, 0)}, ValueError, "x has shape \\(3, 7, 0\\); accepted: \\(..., D\\), D > 0"),
    ({"down": zeros(R, D + 1)}, ValueError, "down has shape \\(5, 25\\); accepted: \\(R, D\\) = \\(5, 24\\)"),
    ({"up": zeros(D, R + 1)}, ValueError, "up has shape \\(24, 6\\); accepted: \\(N, R\\) = \\(24, 5\\)"),
    ({"up": zeros(D + 1, R), "up_bias": None}, ValueError, 'up gives 25 channels and x has 24'),
    ({"up": zeros(D)}, ValueError, "up \\(24,\\); accepted: \\(R, D\\), \\(N, R\\)"),
    ({"down_bias": zeros(R + 1)}, ValueError, "down_bias has shape \\(6,\\)"),
    ({"up_bias": zeros(1, D)}, ValueError, "up_bias has shape \\(1, 24\\); accepted: \\(N,\\)"),
    ({"route": zeros(B, 2)}, ValueError, "up has shape \\(24, 5\\); accepted: \\(N, E R\\) = \\(24, 10\\)"),
    ({"route": zeros(B, 2), "up": zeros(D, 10)}, ValueError, "up_bias has shape \\(24,\\); accepted: \\(E, N\\)"),
    ({"route": zeros(B + 1, 2)}, ValueError, "route has shape \\(4, 2\\); accepted for x \\(3, 7, 24\\): \\(B, E\\)"),
    ({"norm_weight": zeros(D)}, ValueError, 'norm is "none", yet norm_weight'),
    ({"norm": "rms", "norm_weight": zeros(D), "norm_bias": zeros(D)}, ValueError, "RMSNorm has none"),
    ({"norm": "layer", "norm_bias": zeros(D)}, ValueError, "norm_bias is given without norm_weight"),
    ({"norm": "batch"}, ValueError, "norm is 'batch'; accepted: none, layer, rms"),
    ({"act": "tanh"}, ValueError, "act is 'tanh'; accepted: none, gelu, gelu_tanh, silu, relu, quick_gelu"),
    ({"skip": True}, ValueError, "skip is True; accepted: add, gated, none"),
    ({"gate_act": "tanh"}, ValueError, "gate_act is 'tanh'; accepted: none, sigmoid"),
    ({"gate_act": "sigmoid"}, ValueError, "gate_act is 'sigmoid' without a gate"),
    ({"gate": zeros(B, 1, D)}, ValueError, "gate has shape \\(3, 1, 24\\); accepted for x \\(3, 7, 24\\)"),
    ({"gate": zeros(B)}, ValueError, "gate has shape \\(3,\\); accepted"),
    ({"base": zeros(B, L, D + 1)}, ValueError, "base has shape \\(3, 7, 25\\)"),
    ({"residual": zeros(L, D)}, ValueError, "residual has shape \\(7, 24\\)"),
    ({"p": 1.0}, ValueError, "p is 1.0; accepted"),
    ({"seed": zeros(2, dtype=torch.int64)}, ValueError, "seed is torch.int64 \\(2,\\)"),
    ({"x": zeros(B, L, D, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"down": zeros(R, D, dtype=torch.bfloat16)}, TypeError, "down has dtype torch.bfloat16, x has torch.float32"),
    ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ({"route": [1.0]}, TypeError, "route must be a torch.Tensor, got list"),
])  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        bottleneck_adapter(**(arguments() | changes))
