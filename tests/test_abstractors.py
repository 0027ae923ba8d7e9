"""mPLUG-Owl's abstractors and Honeybee's resampler: upstream's equation in float64, positions, masks, what users do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from equations import (
    Variant,
    attention,
    by_hand,
    check_checkpointing,
    check_children,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    layer_norm,
    lin,
    made,
    of_module,
    on_triton,
    randomised,
    same_in_float64,
    slow_on_kernels,
    tokens,
)

from vlkernels import backends, use_backend
from vlkernels.modules import HoneybeeResampler, MPLUGOwl2Abstractor, MPLUGOwlAbstractor
from vlkernels.modules._positions import sincos_1d, sincos_2d
from vlkernels.modules.abstractor import AbstractorLayer

pytestmark = pytest.mark.usefixtures("on_the_reference")
OPS = ("cross_attention", "linear_projector", "multi_layer_kv", "norm_residual")


def without(*names):
    return tuple(op for op in OPS if op not in names)


# -- the equation, with queries and image concatenated -------------------------------------------------------------


def owl(heads, queries="query_tokens", top="abstractor.", fc="visual_fc"):
    def equation(p, x, mask=None):
        if f"{top}visual_input_fc.weight" in p:
            x = x + p["pos_emb"] if "pos_emb" in p else x
            x = lin(p, "visual_input_fc", x)
        q = p[queries].expand(len(x), -1, -1)
        added = None
        if mask is not None:
            keep = torch.cat((torch.ones(len(x), q.shape[1], device=x.device), mask), 1)
            added = ((1 - keep) * torch.finfo(torch.float32).min)[:, None, None].to(x.dtype)
        i = 0
        while f"{top}encoder.layers.{i}.crossattention.norm1.weight" in p:
            a = f"{top}encoder.layers.{i}.crossattention."
            at, out = f"{a}attention.", f"{a}output."
            n = layer_norm(p, f"{a}norm1", q)
            c = torch.cat((n, layer_norm(p, f"{a}normk", x)), 1)
            nq, ck = n, c
            if f"{at}q_pos_embed" in p:
                nq = n + p[f"{at}q_pos_embed"]
                ck = c + torch.cat((p[f"{at}q_pos_embed"], p[f"{at}k_pos_embed"]))
            o = attention(lin(p, f"{at}query", nq), lin(p, f"{at}key", ck), lin(p, f"{at}value", c), heads, added=added)
            y = n + lin(p, f"{out}out_proj", o)
            z = layer_norm(p, f"{out}norm2", y)
            h = F.silu(lin(p, f"{out}mlp.w1", z)) * lin(p, f"{out}mlp.w3", z)
            q = y + lin(p, f"{out}mlp.w2", layer_norm(p, f"{out}mlp.ffn_ln", h, 1e-6))
            i += 1
        y = lin(p, f"{top}{fc}", q)
        eos = p.get(f"{top}vit_eos")
        return y if eos is None else torch.cat((y, eos.expand(len(y), -1, -1)), 1)

    return equation


def masked(*shape, everything=False):
    def inputs():
        mask = torch.ones(shape[:2], dtype=torch.int64)
        mask[0, shape[1] // 2 :] = 0
        mask[1, 0 if everything else 1 :: 2] = 0
        if everything:
            mask[1] = 0
        return torch.randn(*shape), mask

    return inputs


OWL1, OWL2, BEE = "abstractor.mplug_owl1", "abstractor.mplug_owl2", "abstractor.honeybee_resampler"


def owl1(*sizes, **options):
    return lambda: MPLUGOwlAbstractor(*sizes, **options)


def owl2(*sizes, **options):
    return lambda: MPLUGOwl2Abstractor(*sizes, **options)


def bee(*sizes, **options):
    return lambda: HoneybeeResampler(*sizes, **options)


two = owl(2, "query_embeds", "")
honey = owl(2, top="", fc="visual_output_fc")
CASES = {
    "owl1": Variant(OWL1, owl1(16, 18, 5, 2, 2, 20), owl(2), tokens(2, 10, 16), OPS),
    "owl1 masked": Variant(OWL1, owl1(16, 18, 5, 2, 2, 20), owl(2), masked(2, 10, 16), OPS),
    "owl1 nothing seen": Variant(OWL1, owl1(16, 18, 5, 2, 2, 20), owl(2), masked(2, 10, 16, everything=True), OPS),
    "owl1 level 1": Variant(OWL1, owl1(12, 18, 3, 3, 2, 20, level=1), owl(2), masked(3, 7, 12),
                            without("multi_layer_kv")),
    "owl1 one layer, head dim 10": Variant(OWL1, owl1(20, 8, 4, 1, 2, 14), owl(2), masked(2, 5, 20),
                                           without("norm_residual")),
    "owl1 one image": Variant(OWL1, owl1(16, 18, 5, 2, 4, 20), owl(4), tokens(1, 10, 16), OPS),
    "owl2": Variant(OWL2, owl2(16, 18, 5, 2, 2, 20, grid_size=3), two, masked(2, 10, 16), OPS),
    "owl2 no cls, level 1": Variant(OWL2, owl2(12, 18, 4, 2, 2, 20, grid_size=2, use_cls_token=False, level=1), two,
                                    tokens(2, 4, 12), without("multi_layer_kv")),
    "owl2 head dim 10": Variant(OWL2, owl2(20, 7, 3, 2, 2, 22, grid_size=4), two, tokens(2, 17, 20), OPS),
    "honeybee": Variant(BEE, bee(9, 14, 18, 16, 5, 2, 2, 20), honey, masked(2, 9, 14), OPS),
    "honeybee bare, level 1": Variant(BEE, bee(9, 14, 18, 12, 5, 2, 2, 20, num_eos_tokens=0, pos_emb=False, level=1),
                                      honey, tokens(2, 7, 14), without("multi_layer_kv")),
    "honeybee two eos": Variant(BEE, bee(9, 14, 18, 16, 5, 2, 2, 20, num_eos_tokens=2), honey, tokens(2, 9, 14), OPS),
}  # fmt: skip
FAMILIES = ("owl1 masked", "owl2", "honeybee")


@pytest.mark.parametrize("name, backend", slow_on_kernels(CASES, ["owl1 level 1", "owl2", "honeybee"]))
def test_against_float64_by_hand(name, backend, device):
    check_rule(CASES[name], backend, device)


@pytest.mark.parametrize("name", CASES)
def test_two_sources_and_all_layers_at_once_are_upstreams_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_state_dict_goes_to_upstream_and_back(name):
    check_names(CASES[name])


@pytest.mark.parametrize("name, backend", slow_on_kernels(["owl1 level 1", "owl2", "honeybee"], ["owl1 level 1"]))
def test_autocast(name, backend, device):
    check_rule(CASES[name], backend, device, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_in_one_graph(name, device):
    check_one_graph(CASES[name], "reference", device)


@on_triton
@pytest.mark.slow
def test_compiles_in_one_graph_with_kernels(device):
    check_one_graph(CASES["owl2 no cls, level 1"], "triton", device)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "honeybee" else n for n in FAMILIES])
def test_checkpointing_and_copies(name):
    check_checkpointing(CASES[name], training=True)
    check_copies(CASES[name])


@pytest.mark.parametrize("name", ["owl1", "owl2", "honeybee"])
def test_a_lora_a_subclass_or_a_hook_on_a_child_acts(name):
    check_children(CASES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_image(name):
    module, (x, mask) = made(CASES[name])
    assert module(x[:0], mask[:0]).shape == (0, *module(x).shape[1:])


def test_a_layer_may_be_hooked_or_replaced():
    module, inputs = made(CASES["owl2"])
    y, seen = module(*inputs), []
    handle = module.layers[0].register_forward_hook(lambda layer, args, y: seen.append(y.shape))
    assert torch.equal(module(*inputs), y) and seen == [(2, 5, 16)]
    handle.remove()

    class Doubled(AbstractorLayer):
        def forward(self, q, x, mask=None, source=None):
            return 2 * super().forward(q, x, mask, source)

    class Own(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, q, x, mask):
            return 2 * self.layer(q, x, mask)

    twin = copy.deepcopy(module)
    module.layers[1].__class__ = Doubled
    twin.layers[1] = Own(twin.layers[1])
    module, twin, inputs = module.double(), twin.double(), (inputs[0].double(), inputs[1])
    same_in_float64({"y": module(*inputs).detach()}, {"y": twin(*inputs).detach()})
    assert not torch.equal(module(*inputs).float(), y)


# -- masks and dropout ---------------------------------------------------------------------------------------------


def test_masked_tokens_change_nothing_and_kinds_of_mask():
    module, (x, mask) = made(CASES["owl1 masked"])
    y = module(x, mask)
    other = x.clone()
    other[mask == 0] = 100.0
    assert torch.equal(module(other, mask), y)
    assert torch.equal(module(x, mask.bool()), y) and torch.equal(module(x, mask.float()), y)
    assert not torch.equal(module(x), y)
    assert torch.equal(module(x, mask[:1]), module(x, mask[:1].expand(2, -1)))


def test_attention_dropout_acts_in_training_and_is_replayed():
    module, (x, mask) = made(CASES["owl1 masked"])
    assert module.layers[0].dropout == 0.1 and MPLUGOwl2Abstractor(16, 8, 2, 1, 2, 8).layers[0].dropout == 0.0
    y = module(x, mask)
    module.train()
    torch.manual_seed(3)
    first = module(x, mask)
    torch.manual_seed(3)
    assert torch.equal(module(x, mask), first) and not torch.equal(first, y)


# -- positions -----------------------------------------------------------------------------------------------------


def test_positions_are_buffers_of_every_layer():
    module = MPLUGOwl2Abstractor(16, 18, 5, 2, 2, 20, grid_size=3)
    for layer in module.layers:
        assert torch.equal(layer.q_pos_embed, sincos_1d(torch.arange(5), 16).float())
        assert torch.equal(layer.k_pos_embed[1:], sincos_2d(3, 3, 16).flatten(0, 1).float())
        assert not layer.k_pos_embed[0].any()
    buffers = {n for n, _ in module.named_buffers()}
    assert buffers == {f"layers.{l}.{n}_pos_embed" for l in (0, 1) for n in "qk"} <= set(module.state_dict())


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("how", ["loaded", "in place"])
def test_a_checkpoint_may_hold_any_position_table(level, how):
    """One that is no row beside a column is added to the keys after their product."""
    variant = CASES["owl2"]
    module, inputs = randomised(MPLUGOwl2Abstractor(16, 18, 5, 2, 2, 20, grid_size=3, level=level)).double(), None
    inputs = tuple(t.double() if t.is_floating_point() else t for t in variant.inputs())
    module(*inputs)
    table = torch.randn(10, 16).double()
    if how == "loaded":
        state = module.state_dict()
        state["layers.1.k_pos_embed"] = table
        module.load_state_dict(state)
        assert not module.layers[1].on_grid() and module.layers[0].on_grid()
    else:
        module.layers[1].k_pos_embed.copy_(table)
    with backends.record() as calls:
        got = of_module(module, inputs)
    assert ("multi_layer_kv", "reference") in calls
    same_in_float64(got, by_hand(variant, module, inputs, torch.float64))


@on_triton
def test_level_1_keeps_no_keys_and_values(device):
    """Beside x, both levels keep per query what they keep; level 0 keeps N 2 D numbers a layer more."""
    saved = {}
    B, N, D, L = 2, 50, 16, 3
    for level in (0, 1):
        module = MPLUGOwl2Abstractor(D, 18, 5, L, 2, 20, grid_size=7, level=level).to(device)
        own, sizes = {p.data_ptr() for p in module.parameters()}, {}

        def pack(t, own=own, sizes=sizes):
            if t.data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(torch.randn(B, N, D, device=device))
        saved[level] = sum(sizes.values())
        del y
    packed = L * 2 * D * (D + 14)  # level 0: with the norm and the grid's columns; level 1 joins the parts again
    columns = L * 14 * D
    assert saved[0] - saved[1] >= L * B * N * 2 * D + packed - columns


def test_an_old_checkpoint_with_a_position_for_cls():
    module, twin = (randomised(HoneybeeResampler(9, 14, 18, 16, 5, 1, 2, 20)) for _ in range(2))
    state = module.state_dict()
    state["pos_emb"] = torch.cat((torch.ones(1, 1, 14), state["pos_emb"]), 1)
    twin.load_state_dict(state)
    assert torch.equal(twin.pos_emb, module.pos_emb) and state["pos_emb"].shape == (1, 10, 14)


def test_honeybee_leaves_its_input_as_it_is():
    module, (x, mask) = made(CASES["honeybee"])
    before = x.clone()
    module(x, mask)
    assert torch.equal(x, before)


# -- inits and sizes -----------------------------------------------------------------------------------------------


def test_published_sizes_and_inits():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(MPLUGOwlAbstractor(device="meta")) == 105_097_216
    module = MPLUGOwl2Abstractor(device="meta")
    assert count(module) == 81_473_536 and sum(b.numel() for b in module.buffers()) == 6_690_816
    module = MPLUGOwl2Abstractor(64, 64, 64, 1, 4, 96, grid_size=2)
    assert 0.9 < module.query_tokens.std() < 1.1
    others = MPLUGOwlAbstractor(64, 64, 64, 1, 4, 96), HoneybeeResampler(9, 14, 64, 64, 64, 1, 4, 96)
    for module in (module, *others):  # noqa: B020
        for name, parameter in module.named_parameters():
            if "norm" in name or "ffn_ln" in name:
                assert bool((parameter == float(name.endswith("weight"))).all()), name
            elif name.endswith("bias"):
                assert not parameter.any(), name
            elif name != "query_tokens" or not isinstance(module, MPLUGOwl2Abstractor):
                assert 0.013 < parameter.std() < 0.027, name
        assert module.layers[0].ffn_ln.eps == 1e-6 and module.layers[0].normk.eps == 1e-5


# -- bad input -----------------------------------------------------------------------------------------------------


def call(module, *args):
    return module(*args)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: MPLUGOwlAbstractor(16, 18, 0, 2, 2, 20), "n_query is 0"),
        (lambda: MPLUGOwlAbstractor(16, 18, 5, 0, 2, 20), "layers 0"),
        (lambda: MPLUGOwlAbstractor(16, 18, 5, 2, 3, 20), "hidden_size is 16 with 3 heads"),
        (lambda: MPLUGOwlAbstractor(16, 18, 5, 2, 2, 20, dropout=1.0), "dropout is 1.0"),
        (lambda: MPLUGOwlAbstractor(16, 18, 5, 2, 2, 20, level=2), "level is 2"),
        (lambda: MPLUGOwl2Abstractor(18, 18, 5, 2, 3, 20), "hidden_size is 18; accepted: a multiple of 4"),
        (lambda: MPLUGOwl2Abstractor(16, 18, 5, 2, 2, 20, grid_size=0), "grid_size is 0"),
        (lambda: HoneybeeResampler(9, 14, 18, 16, 5, 2, 2, 20, num_eos_tokens=-1), "num_eos_tokens -1"),
        (lambda: call(CASES["owl1"].make(), torch.randn(2, 10, 15)), r"x has shape \(2, 10, 15\); .* C = 16"),
        (lambda: call(CASES["owl1"].make(), torch.randn(10, 16)), r"accepted: \(B, N, C\)"),
        (
            lambda: call(CASES["owl1"].make(), torch.randn(2, 10, 16), torch.ones(2, 9)),
            r"mask is .* \(2, 9\)",
        ),
        (
            lambda: call(CASES["owl1"].make(), torch.randn(2, 10, 16), torch.ones(3, 10)),
            r"mask is .* \(3, 10\)",
        ),
        (lambda: call(CASES["owl2"].make(), torch.randn(2, 9, 16)), r"x has 9 tokens; accepted: 3 x 3 \+ CLS = 10"),
        (lambda: call(CASES["honeybee"].make(), torch.randn(2, 10, 14)), "x has 10 tokens; accepted: the 9 rows"),
        (lambda: call(CASES["honeybee"].make(), torch.randn(2, 9, 16)), "with C = 14"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
