"""Deformable attention in use: the D-Abstractor by hand in float64, transformers' module, edges, saved bytes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from equations import (
    BACKENDS,
    Variant,
    by_hand,
    check_checkpointing,
    check_children,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    made,
    of_module,
    on_triton,
    randomised,
    same_in_float64,
    tokens,
)

from benchmarks.providers.deformable_attention import equation as eager
from benchmarks.upstream_maps import d_abstractor as dabs
from vlkernels import backends, deformable_attention, use_backend
from vlkernels.modules import DAbstractor, MultiScaleDeformableAttention
from vlkernels.ops.deformable_attention import cases
from vlkernels.ops.deformable_attention import triton as kernels
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

OP = backends.OPS["deformable_attention"]
OPS = (
    "cross_attention",
    "deformable_attention",
    "linear_projector",
    "mlp_projector",
    "multi_layer_kv",
    "norm_residual",
)
D_ABS = "abstractor.honeybee_d"
# two heads and maps, references for all images
SMALL = cases._case("small", 2, 33, 2, 12, 2, ((5, 7), (3, 4)), reference=(1, 1))


# -- the D-Abstractor by hand --------------------------------------------------------------------------------------


def abstractor(*sizes, **options):
    return lambda: DAbstractor(*sizes, **options)


CASES = {
    "query": Variant(D_ABS, abstractor(16, 20, 24, 16, 9, 2, 2, 24, 3), dabs(2, 3, "query"), tokens(2, 16, 20), OPS),
    "tgt, eos, no projections": Variant(
        D_ABS, abstractor(25, 16, 16, 16, 4, 1, 4, 20, 2, pooled_v_target="tgt", num_eos_tokens=1),
        dabs(4, 2, "tgt"), tokens(2, 25, 16), OPS),
    "none, level 1": Variant(
        D_ABS, abstractor(9, 14, 24, 12, 4, 2, 2, 20, 2, pooled_v_target="none", num_eos_tokens=2, pos_emb=False,
                          level=1), dabs(2, 2, "none"), tokens(3, 9, 14), OPS),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64_by_hand(name, backend, device):
    check_rule(CASES[name], backend, device)


@pytest.mark.parametrize("name", CASES)
def test_values_of_all_layers_at_once_are_upstreams_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_state_dict_goes_to_upstream_and_back(name):
    check_names(CASES[name])


@pytest.mark.parametrize("name", [n if n.startswith("tgt") else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(name, backend, device):
    """The output. Where bf16 moves an offset over the edge of a position its gradient jumps, in any implementation, so
    that gradients have no error to compare; that they are there, finite and float32 is seen."""
    variant, found = CASES[name], []
    for _ in range(5):
        module, inputs = made(variant, device)
        usual = by_hand(variant, module, inputs, torch.float32, torch.bfloat16)["y"]
        exact = by_hand(variant, module, inputs, torch.float64)["y"]
        found.append((float((usual.double() - exact).abs().max()), float(exact.abs().max())))
    baseline, scale = (max(column) for column in zip(*found, strict=True))
    parameters = dict(module.named_parameters())
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y = module(*inputs)
    assert y.dtype == usual.dtype
    assert (y.double() - exact).abs().max() <= 2 * baseline + 4 * compare.ulp(scale, torch.bfloat16)
    grads = torch.autograd.grad(y.float().square().sum(), list(parameters.values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["query", "none, level 1"])
def test_compiles_in_one_graph(name, device):
    check_one_graph(CASES[name], "reference", device)


@on_triton
@pytest.mark.slow
def test_compiles_in_one_graph_with_kernels(device):
    check_one_graph(CASES["tgt, eos, no projections"], "triton", device)


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_and_copies(name):
    with use_backend("reference"):
        check_checkpointing(CASES[name], training=True)
    check_copies(CASES[name])


@on_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpointing_with_kernels(name):
    with use_backend("triton"):
        check_checkpointing(CASES[name], training=True)


@pytest.mark.parametrize("name", ["query", "none, level 1"])
def test_a_lora_a_subclass_or_a_hook_on_a_child_acts(name):
    check_children(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_no_image(name):
    module, (x,) = made(CASES[name])
    with use_backend("reference"), backends.record() as calls:
        y = module(x)
    assert [op for op, _ in calls].count("multi_layer_kv") == 1
    assert [op for op, _ in calls].count("deformable_attention") == len(module.layers)
    assert module(x[:0]).shape == (0, *y.shape[1:])


def test_a_layer_or_its_attention_may_be_hooked_or_replaced():
    module, (x,) = made(CASES["query"])
    module, x = module.double(), x.double()
    y, seen = module(x).detach(), []
    handle = module.layers[0].register_forward_hook(lambda layer, args, y: seen.append(y.norm))
    same_in_float64({"y": module(x).detach()}, {"y": y})
    assert seen == [None]
    handle.remove()
    handle = module.layers[1].encoder_attn.register_forward_hook(lambda layer, args, y: 2 * y)
    twice = module(x).detach()
    assert (twice - y).abs().max() > 1e-3
    handle.remove()

    class Doubled(MultiScaleDeformableAttention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    twin = copy.deepcopy(module)
    twin.layers[1].encoder_attn.__class__ = Doubled
    same_in_float64({"y": twin(x).detach()}, {"y": twice})


def test_dropout_acts_in_training_and_is_replayed():
    module, (x,) = made(CASES["query"])
    assert module.layers[0].dropout == 0.1
    with use_backend("reference"):
        y = module(x)
        module.train()
        torch.manual_seed(3)
        first = module(x)
        torch.manual_seed(3)
        assert torch.equal(module(x), first) and not torch.equal(first, y)


def test_an_old_checkpoint_with_a_position_for_cls():
    module, twin = (randomised(CASES["query"].make()) for _ in range(2))
    state = module.state_dict()
    state["v_pos_emb"] = torch.cat((torch.ones(1, 1, 16), state["v_pos_emb"]), 1)
    twin.load_state_dict(state)
    assert torch.equal(twin.v_pos_emb, module.v_pos_emb) and state["v_pos_emb"].shape == (1, 17, 16)


def test_published_sizes_and_inits():
    module = DAbstractor(576, 1024, 4096, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 55_944_032
    module = DAbstractor(576, 1024, 4096, 64, 144, 2, 8, 96, num_eos_tokens=2)
    at = (torch.linspace(0.5, 23.5, 12) / 24).double()
    grid = module.reference_points[0].double().view(12, 12, 2)  # rows of y
    assert torch.equal(grid[3, :, 0], at) and torch.equal(grid[:, 5, 1], at)
    for name, p in module.named_parameters():
        if "norm" in name:
            assert bool((p == float(name.endswith("weight"))).all()), name
        elif "sampling_offsets.weight" in name or "attention_weights" in name:
            assert not p.any(), name
        elif "sampling_offsets.bias" in name:
            steps = p.view(8, 1, 4, 2)
            assert torch.equal(steps.abs().amax(-1).float(), torch.arange(1.0, 5).expand(8, 1, 4))
            # head 2 of 8 looks up: an angle of 90 degrees
            assert (steps[2, 0, 0] - torch.tensor([0.0, 1.0])).abs().max() < 1e-6
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "reference_points" not in name and "encoder_attn" not in name:
            assert 0.013 < p.std() < 0.027, name
    before = module.reference_points.detach().clone()
    module.reset_parameters()
    assert torch.equal(module.reference_points, before)


# -- transformers' module ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_as_in_transformers(boxes, masked):
    """The same keys, and in float64 the same outputs and gradients, with points and boxes as references."""
    models = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = models.DeformableDetrConfig(d_model=24, num_feature_levels=2)
    stock = models.DeformableDetrMultiscaleDeformableAttention(config, 3, 2).double()
    module = MultiScaleDeformableAttention(24, 2, 3, 2).double()
    randomised(stock)
    module.load_state_dict(stock.state_dict(), strict=True)
    assert list(module.state_dict()) == list(stock.state_dict())
    shapes = [(3, 4), (2, 5)]
    query, x = torch.randn(2, 7, 24).double(), torch.randn(2, 22, 24).double()
    reference = torch.rand(2, 7, 2, 4 if boxes else 2).double()
    mask = torch.rand(2, 22) > 0.3 if masked else None
    found = []
    for call, parameters in (
        (lambda q, x, r: module(q, r, x, shapes, mask), dict(module.named_parameters())),
        (lambda q, x, r: stock(
            q, attention_mask=mask, encoder_hidden_states=x, reference_points=r,
            spatial_shapes=torch.tensor(shapes), spatial_shapes_list=shapes,
            level_start_index=torch.tensor([0, 12]),
        )[0], dict(stock.named_parameters())),
    ):  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in (query, x, reference)]
        y = call(*leaves)
        y.backward(torch.cos(torch.arange(y.numel()).double()).view(y.shape))
        found.append({"y": y.detach()} | {f"d{i}": t.grad for i, t in enumerate(leaves)}
                     | {n: p.grad for n, p in parameters.items()})  # fmt: skip
    same_in_float64(*found)


# -- edges of maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_outside_of_the_map_and_nan(backend, device):
    """As grid_sample on a CPU: zero far outside, NaN for NaN and for infinity; no value's gradient sees it."""
    value = torch.ones(1, 6, 1, 4, device=device, requires_grad=True)
    places = [(0.5, 0.5), (-0.1, 0.5), (5.0, 0.5), (1e30, -1e30), (math.nan, 0.5), (0.5, math.inf), (0.0, 0.0)]
    points = torch.tensor(places, device=device).view(1, 7, 1, 1, 1, 2).requires_grad_()
    weights = torch.ones(1, 7, 1, 1, 1, device=device)
    y = deformable_attention(value, points, weights, shapes=[(2, 3)], softmax=False, backend=backend)
    maps, grid = value.detach().cpu().transpose(1, 3).reshape(1, 4, 2, 3), 2 * points.detach().cpu()[:, :, 0, 0] - 1
    want = F.grid_sample(maps, grid, align_corners=False)[0, 0, :, 0]
    got = y[0, :, 0, 0].detach().cpu()
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().tolist() == [False] * 4 + [True] * 2 + [False]
    assert torch.allclose(got, want, atol=0, rtol=1e-5, equal_nan=True) and got[3] == 0 and got[6] == 0.25
    y.backward(torch.ones_like(y))
    assert not value.grad.isnan().any() and not points.grad[0, :4].isnan().any() and not points.grad[0, 6].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_query_stays_in_it(backend, device):
    """A NaN logit spoils its query's output and the values that this query reads, no other image or head."""
    kw = cases.inputs(SMALL, Make(PRECISIONS["fp32"], 0, device))
    kw["weights"].data[0, 3, 1, 0, 0] = math.nan
    y = deformable_attention(**kw, backend=backend)
    bad = y.isnan().any(-1)
    assert bad.sum() == 1 and bad[0, 3, 1]
    dy = torch.ones_like(y)
    dy[0, 3, 1] = 0
    grads = torch.autograd.grad(y, kw["value"], dy)[0].isnan()
    assert not grads[1].any() and not grads[:, :, 0].any() and not grads[0, :, 1].all()


@on_triton
def test_the_pass_over_queries_that_are_far_away(device, monkeypatch):
    """On large maps tiles of queries that come near no row of a block are left out: the same bits."""
    case = cases._case("large", 1, 70, 1, 8, 2, ((20, 9),))
    kw = cases.inputs(case, Make(PRECISIONS["fp32"], 0, device))
    # queries in the order of their rows, as an encoder's
    kw["reference"] = torch.rand(1, 70, 1, 2, device=device)
    kw["reference"][0, :, 0, 1] = torch.linspace(0, 1, 70)
    kw["points"].data.mul_(0.2)
    found = []
    for skip_from in (10**6, 1):
        monkeypatch.setattr(kernels, "SKIP_FROM", skip_from)
        y = deformable_attention(**kw, backend="triton")
        found.append(
            torch.autograd.grad(y, kw["value"], torch.cos(torch.arange(y.numel(), device=device)).view(y.shape))
        )
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].abs().sum() > 0


@on_triton
def test_each_gradient_alone(device):
    """Whatever else is frozen, a gradient is the one that all of them give."""
    kw = cases.inputs(cases.CASES[3], Make(PRECISIONS["fp32"], 0, device))
    names = ("value", "points", "weights", "reference")
    whole = torch.autograd.grad(deformable_attention(**kw, backend="triton").sum(), [kw[n] for n in names])
    for name, want in zip(names, whole, strict=True):
        alone = kw | {n: kw[n].detach().requires_grad_(n == name) for n in names}
        (got,) = torch.autograd.grad(deformable_attention(**alone, backend="triton").sum(), alone[name])
        assert torch.equal(got, want), name


@on_triton
def test_views_are_read_as_they_lie(device):
    """Values, offsets and logits that are slices of packed products, and a batch of one query set for all images."""
    packed = torch.randn(2, 12, 3, 2, 8, device=device)
    both = torch.randn(1, 5, 2 * 3 * 3, device=device)
    value = packed[:, :, 1]
    points = both[..., :12].unflatten(-1, (2, 1, 3, 2)).expand(2, -1, -1, -1, -1, -1)
    weights = both[..., 12:].unflatten(-1, (2, 1, 3)).expand(2, -1, -1, -1, -1)
    reference = torch.rand(1, 5, 1, 2, device=device)
    laid = kernels.laid_out(value, points, weights, reference)
    assert all(a is b for a, b in zip(laid, (value, points, weights, reference), strict=True))
    got = deformable_attention(value, points, weights, reference, [(3, 4)], backend="triton")
    copies = [t.contiguous() for t in (value, points, weights, reference)]
    assert torch.equal(got, deformable_attention(*copies, [3, 4], backend="triton"))


# -- what is saved -------------------------------------------------------------------------------------------------


@on_triton
@pytest.mark.parametrize("side, most", [(8, 0.33), (12, 0.51)])
def test_saved_bytes_of_the_op(side, most, device):
    """Beside grid_sample's: 144 queries on 256 and on 576 tokens, here a quarter of each.

    Beyond its inputs the op keeps the softmax's statistics alone. With values, offsets and logits counted too it keeps
    a third at 256 tokens; at 576 a half and a little, for there grid_sample keeps the values and as many samples.
    """
    case = cases._case("honeybee", 2, 36, 2, 128, 4, ((side, side),), reference=(1, 1))
    kw = cases.inputs(case, Make(PRECISIONS["fp32"], 0, device))
    inputs = [t for t in kw.values() if isinstance(t, torch.Tensor)]
    for apart, share in (((), most), (inputs, 0.005)):
        ours = meter.saved_bytes(lambda: deformable_attention(**kw, backend="triton"), apart)
        theirs = meter.saved_bytes(lambda: eager(**kw), apart)
        assert ours <= share * theirs, ours / theirs


@on_triton
@pytest.mark.parametrize("side, most", [(8, 0.65), pytest.param(12, 0.70, marks=pytest.mark.slow)])
def test_saved_bytes_of_the_abstractor(side, most, device):
    """The whole module, self-attention and FFN included, beside upstream's equation in plain PyTorch, at the published
    proportions of queries, tokens, channels and heads. What is left are the inputs of its products."""
    variant = Variant(D_ABS, abstractor(side**2, 128, 512, 128, 36, 1, 4, 128, 4, dropout=0.0), dabs(4, 4, "query"),
                      tokens(2, side**2, 128), OPS)  # fmt: skip
    module, (x,) = made(variant, device)
    parameters = dict(module.named_parameters())

    def ours():
        with use_backend("triton"):
            return module(x)

    counted = [meter.saved_bytes(f, parameters.values()) for f in (ours, lambda: variant.equation(parameters, x))]
    assert counted[0] <= most * counted[1], counted[0] / counted[1]


# -- bad input -----------------------------------------------------------------------------------------------------


def changed(**other):
    kw = cases.inputs(SMALL, Make(PRECISIONS["fp32"]))
    return lambda: deformable_attention(**(kw | {n: f(kw[n]) if callable(f) else f for n, f in other.items()}))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (changed(value=lambda t: t[0]), r"value has shape \(47, 2, 12\); accepted: \(B, S, H, K\)"),
        (changed(value=lambda t: t[:, :46]), r"47 positions; value has 46"),
        (changed(value=lambda t: t[..., :0]), "H and K > 0"),
        (changed(value=lambda t: t.long()), "value has dtype torch.int64"),
        (changed(weights=lambda t: t[0]), r"accepted: \(B, M, H, L, P\) with B = 2, H = 2"),
        (changed(weights=lambda t: t[..., :0]), "L and P > 0"),
        (changed(points=lambda t: t[..., :1]), r"points has shape .* accepted: \(B, M, H, L, P, 2\)"),
        (changed(points=lambda t: t[:, :5]), "points has shape"),
        (changed(reference=lambda t: t[:, :5]), r"reference has shape \(1, 5, 1, 2\); .* M = 33"),
        (changed(reference=lambda t: t[0]), r"reference has shape \(33, 1, 2\)"),
        (changed(reference=lambda t: t.expand(3, -1, -1, -1)), r"B or 1, M, L or 1, 2"),
        (changed(shapes=[(5, 7)]), "shapes holds 2 numbers; accepted: .* each of the 2 levels"),
        (changed(shapes=[(5, 7), (0, 4)]), r"accepted: heights and widths of 1 or more"),
        (changed(shapes=[(5, 7), (3, 3)]), "44 positions; value has 47"),
        (changed(shapes=[(5, 7, 1), (3, 4)]), "accepted: pairs"),
        (changed(shapes=[5.0, 7, 3, 4]), "accepted: ints"),
        (changed(shapes=torch.tensor([[5, 7], [3, 4]])), "shapes is a torch.Tensor; accepted: ints of the host"),
        (changed(dtype=torch.int32), "dtype is torch.int32"),
        (lambda: MultiScaleDeformableAttention(10, 1, 4), "d_model is 10 with 4 heads"),
        (lambda: MultiScaleDeformableAttention(16, 0, 4), "n_levels is 0"),
        (lambda: MultiScaleDeformableAttention(16, 1, 4)(torch.randn(2, 5, 12), None, None, []), "with C = 16"),
        (lambda: MultiScaleDeformableAttention(16, 1, 4)(
            torch.randn(2, 5, 16), torch.rand(2, 5, 2), torch.randn(2, 4, 16), [(2, 2)]), r"reference has shape"),
        (lambda: MultiScaleDeformableAttention(16, 1, 4)(
            torch.randn(2, 5, 16), torch.rand(2, 5, 1, 2), torch.randn(2, 4, 16), [(2, 2)], torch.ones(2, 5)),
         r"mask has shape \(2, 5\); accepted: \(B, S\)"),
        (lambda: MultiScaleDeformableAttention(16, 1, 4)(
            torch.randn(2, 5, 16), torch.rand(2, 4, 1, 4), torch.randn(2, 4, 16), [(2, 2)]), "B = 2, M = 5, L = 1"),
        (lambda: MultiScaleDeformableAttention(16, 1, 4)(
            torch.randn(3, 5, 16), torch.rand(1, 5, 1, 2), torch.randn(2, 4, 16), [(2, 2)]), "query has a batch of 3"),
        (lambda: DAbstractor(10, 16, 16, 16, 4, 1, 2), "num_input_tokens is 10; accepted: a square"),
        (lambda: DAbstractor(9, 16, 16, 16, 5, 1, 2), "num_queries is 5; accepted: a square"),
        (lambda: DAbstractor(9, 16, 16, 16, 4, 1, 3), "d_model is 16 with 3 heads"),
        (lambda: DAbstractor(9, 16, 16, 16, 4, 0, 2), "layers is 0"),
        (lambda: DAbstractor(9, 16, 16, 16, 4, 1, 2, dropout=1.0), "dropout is 1.0"),
        (lambda: DAbstractor(9, 16, 16, 16, 4, 1, 2, level=2), "level is 2"),
        (lambda: DAbstractor(9, 16, 16, 16, 4, 1, 2, pooled_v_target="q"), "accepted: 'query', 'tgt', 'none'"),
        (lambda: CASES["query"].make()(torch.randn(2, 9, 20)), "x has 9 tokens; accepted: the 16 rows"),
        (lambda: CASES["query"].make()(torch.randn(2, 16, 16)), "with C = 20"),
        (lambda: CASES["none, level 1"].make()(torch.randn(2, 8, 14)), "x's tokens is 8; accepted: a square"),
    ],
)  # fmt: skip
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()


def test_refusals():
    values = OP.values(**cases.inputs(SMALL, Make(PRECISIONS["fp32"])))
    for at, new, says in (
        (0, values[0].double(), "value is torch.float64"),
        (1, values[1].double(), "points is torch.float64"),
        (0, values[0].repeat(1, 1, 1, 22), "heads of 264 channels"),
        (2, values[2].repeat(1, 1, 1, 5, 1), "10 levels of 2 points"),
        (2, values[2].repeat(1, 1, 1, 1, 40), "2 levels of 80 points"),
        (6, torch.float64, "dtype is torch.float64"),
    ):
        changed_values = (*values[:at], new, *values[at + 1 :])
        assert says in kernels.refuses(*changed_values)
    assert kernels.declines(*values) is None


def test_the_other_numbers_of_a_module_are_float64s_too():
    """The eager equation that bytes are compared with is the op's."""
    for case in (SMALL, cases.CASES[1]):
        kw = {n: compare.doubled(t) for n, t in cases.inputs(case, Make(PRECISIONS["fp32"])).items()}
        want = deformable_attention(**kw)
        assert (eager(**kw) - want).abs().max() <= 64 * compare.ulp(float(want.abs().max()), torch.float64)


def test_by_hand_is_the_modules_own_equation():
    """In float64 with the parameters as they start, where offsets are whole numbers of positions."""
    torch.set_default_dtype(torch.float64)
    try:
        module, (x,) = CASES["query"].make().eval(), CASES["query"].inputs()
        got = of_module(module, (x,))["y"]
        want = by_hand(CASES["query"], module, (x,), torch.float64)["y"]
        assert (got - want).abs().max() <= 256 * compare.ulp(float(want.abs().max()), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
