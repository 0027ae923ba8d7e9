"""Mapping networks and LLaMA-Adapter's visual branch: upstream's equations, rows left out, inner loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from equations import (
    Variant,
    attention,
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
    on_triton,
    randomised,
    same_in_float64,
    slow_on_kernels,
    tokens,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlkernels import use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import ESPERMLP, ClipCapMLP, ClipCapTransformer, MAPLMapper, MetaMapper, VisualQuery
from vlkernels.modules._block import SelfAttentionBlock

pytestmark = pytest.mark.usefixtures("on_the_reference")
BLOCKS = ("cross_attention", "linear_projector", "mlp_projector")


# -- the equations, over whole sequences ---------------------------------------------------------------------------


def tanh_mlp(p_tokens, divided=False, normalised=False):
    def equation(p, x):
        last = max(int(name.split(".")[2]) for name in p)
        x = x / x.norm(dim=-1, keepdim=True) if normalised else x
        if divided:
            out = p[f"clip_project.model.{last}.weight"].shape[0]
            x = x / math.sqrt(out / x.shape[-1])
        for i in range(0, last + 2, 2):
            x = lin(p, f"clip_project.model.{i}", x.tanh() if i else x)
        return x.unflatten(-1, (p_tokens, -1))

    return equation


def clipcap(heads, p_tokens, normalised=False):
    def equation(p, x):
        top = "clip_project."
        x = x / x.norm(dim=-1, keepdim=True) if normalised else x
        const = p[f"{top}prefix_const"]
        x = lin(p, f"{top}linear", x).unflatten(-1, (-1, const.shape[1]))
        x = torch.cat((x, const.expand(len(x), -1, -1)), 1)
        i = 0
        while f"{top}transformer.layers.{i}.norm1.weight" in p:
            a = f"{top}transformer.layers.{i}."
            n = layer_norm(p, f"{a}norm1", x)
            keys, values = lin(p, f"{a}attn.to_keys_values", n).chunk(2, -1)
            x = x + lin(p, f"{a}attn.project", attention(lin(p, f"{a}attn.to_queries", n), keys, values, heads))
            x = x + lin(p, f"{a}mlp.fc2", lin(p, f"{a}mlp.fc1", layer_norm(p, f"{a}norm2", x)).relu())
            i += 1
        return x[:, -p_tokens:]

    return equation


def mapl(heads):
    def equation(p, x):
        const = p["const"]
        x = torch.cat((lin(p, "down", x), const.expand(len(x), -1, -1)), 1)
        i = 0
        while f"transformer.layers.{i}.norm1.weight" in p:
            a = f"transformer.layers.{i}."
            n = layer_norm(p, f"{a}norm1", x)
            q, k, v = F.linear(n, p[f"{a}self_attn.in_proj_weight"], p[f"{a}self_attn.in_proj_bias"]).chunk(3, -1)
            x = x + lin(p, f"{a}self_attn.out_proj", attention(q, k, v, heads))
            x = x + lin(p, f"{a}linear2", lin(p, f"{a}linear1", layer_norm(p, f"{a}norm2", x)).relu())
            i += 1
        return lin(p, "up", x[:, -len(const) :])

    return equation


def visual_query(heads):
    def equation(p, x):
        query = p["visual_query.weight"]
        x = layer_norm(p, "clip_proj_norm", lin(p, "clip_proj", x))
        x = torch.cat((query.expand(len(x), -1, -1), x), 1)
        i = 0
        while f"visual_blocks.{i}.norm1.weight" in p:
            a = f"visual_blocks.{i}."
            q, k, v = lin(p, f"{a}attn.qkv", layer_norm(p, f"{a}norm1", x, 1e-6)).chunk(3, -1)
            x = x + lin(p, f"{a}attn.proj", attention(q, k, v, heads))
            x = x + lin(p, f"{a}mlp.fc2", F.gelu(lin(p, f"{a}mlp.fc1", layer_norm(p, f"{a}norm2", x, 1e-6))))
            i += 1
        return layer_norm(p, "visual_proj_norm", lin(p, "visual_proj", x[:, : len(query)]))

    return equation


def meta(width):
    """Heads of `width` channels, over prefixes and image alike."""

    def equation(p, x, vars=None):
        v = [p[f"mapper_net.vars.{i}"] for i in range(13)] if vars is None else vars
        s = torch.cat((v[0].expand(len(x), -1, -1), x[:, None]), 1)
        q, key, value = (F.linear(s, v[i], v[i + 1]) for i in (1, 3, 5))
        o = q + attention(q, key, value, q.shape[-1] // width, scale=x.shape[-1] ** -0.5)
        o = F.layer_norm(o, o.shape[-1:], v[9], v[10])
        o = o + F.leaky_relu(F.linear(o, v[7], v[8]))
        return F.layer_norm(o, o.shape[-1:], v[11], v[12])[:, : len(v[0])]

    return equation


MLP, ESPER, CLIPCAP, MAPL, META, QUERY = (
    "mapper.clipcap_mlp", "mapper.esper_mlp", "mapper.clipcap_transformer", "mapper.mapl", "mapper.meta_mapper",
    "resampler.llama_adapter_v2",
)  # fmt: skip
CASES = {
    "clipcap mlp": Variant(MLP, lambda: ClipCapMLP(14, 8, 4), tanh_mlp(4), tokens(3, 14), ()),
    "clipcap mlp normalised": Variant(MLP, lambda: ClipCapMLP(14, 7, 3, normalize_prefix=True),
                                      tanh_mlp(3, normalised=True), tokens(3, 14), ()),
    "esper": Variant(ESPER, lambda: ESPERMLP(14, 8, 4, num_layers=3), tanh_mlp(4, True), tokens(3, 14), ()),
    "clipcap": Variant(CLIPCAP, lambda: ClipCapTransformer(14, 16, 4, 3, 2), clipcap(8, 4), tokens(2, 14), BLOCKS),
    "clipcap head dim 10": Variant(
        CLIPCAP, lambda: ClipCapTransformer(14, 20, 5, 2, 1, num_heads=2, mlp_ratio=1.5, normalize_prefix=True),
        clipcap(2, 5, True), tokens(3, 14), BLOCKS,
    ),
    "clipcap level 1": Variant(CLIPCAP, lambda: ClipCapTransformer(14, 12, 3, 3, 3, num_heads=2, level=1),
                               clipcap(2, 3), tokens(2, 14), BLOCKS),
    "mapl": Variant(MAPL, lambda: MAPLMapper(14, 18, 16, 2, 2, 5), mapl(2), tokens(2, 9, 14), BLOCKS),
    "mapl no bias, head dim 6": Variant(MAPL, lambda: MAPLMapper(14, 18, 12, 2, 1, 3, proj_bias=False), mapl(2),
                                        tokens(3, 7, 14), BLOCKS),
    "visual query": Variant(QUERY, lambda: VisualQuery(10, 20, v_embed_dim=16, v_depth=2, v_num_heads=2, query_len=4),
                            visual_query(2), tokens(2, 9, 10), BLOCKS),
    "visual query one block": Variant(
        QUERY, lambda: VisualQuery(10, 20, v_embed_dim=12, v_depth=1, v_num_heads=2, v_mlp_ratio=2.5, query_len=3,
                                   level=1),
        visual_query(2), tokens(3, 7, 10), BLOCKS,
    ),
    "meta": Variant(META, lambda: MetaMapper(16, 24, 4), meta(2), tokens(3, 16),
                    ("cross_attention", "linear_projector", "norm_residual")),
    "meta heads of 6": Variant(META, lambda: MetaMapper(20, 18, 3, num_heads=3), meta(6), tokens(1, 20),
                               ("cross_attention", "linear_projector", "norm_residual")),
}  # fmt: skip
FAMILIES = ("clipcap", "mapl", "visual query", "meta")


@pytest.mark.parametrize("name, backend", slow_on_kernels(CASES, ["clipcap level 1", "mapl", "visual query", "meta"]))
def test_against_float64_by_hand(name, backend, device):
    if backend == "triton" and not CASES[name].ops:
        pytest.skip("no op runs in it")
    check_rule(CASES[name], backend, device)


@pytest.mark.parametrize("name", CASES)
def test_rows_left_out_and_shared_are_upstreams_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_state_dict_goes_to_upstream_and_back(name):
    check_names(CASES[name])


@pytest.mark.parametrize("name, backend", slow_on_kernels(FAMILIES, ["mapl"]))
def test_autocast(name, backend, device):
    check_rule(CASES[name], backend, device, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_in_one_graph(name, device):
    check_one_graph(CASES[name], "reference", device)


@on_triton
@pytest.mark.slow
def test_compiles_in_one_graph_with_kernels(device):
    check_one_graph(CASES["meta"], "triton", device)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_and_copies(name):
    check_checkpointing(CASES[name], training=True)
    check_copies(CASES[name])


@pytest.mark.parametrize("name", ["clipcap mlp", "clipcap", "mapl", "visual query"])
def test_a_lora_a_subclass_or_a_hook_on_a_child_acts(name):
    check_children(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_no_image(name):
    module, (x,) = made(CASES[name])
    assert module(x[:0]).shape == (0, *module(x).shape[1:])


# -- rows that nobody reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_a_block_computes_the_returned_rows_only(packed):
    """The same numbers for those rows, and less of everything but keys and values."""
    D, T = 12, 9
    block = randomised(SelfAttentionBlock(D, 2, 20, act="gelu", packed=packed)).double()
    x = torch.randn(2, T, D).double()

    def results(rows, cut):
        x_ = x.clone().requires_grad_()
        block.zero_grad()
        y = block(x_, rows)[:, cut]
        y.square().sum().backward()
        return {"y": y.detach(), "x": x_.grad} | {n: p.grad.clone() for n, p in block.named_parameters()}

    for rows in (slice(6, None), slice(0, 4)):
        same_in_float64(results(rows, slice(None)), results(slice(None), rows))
    counts = {}
    for rows in (slice(None), slice(6, None)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(x, rows)
        counts[rows.start] = counter.get_total_flops()
    M, inner = 3, 20
    kept = 2 * 2 * (M * D * D + T * D * 2 * D + 2 * M * T * D + M * D * D + 2 * M * D * inner)
    whole = 2 * 2 * (T * D * 3 * D + 2 * T * T * D + T * D * D + 2 * T * D * inner)
    assert counts == {None: whole, 6: kept}


def test_the_last_block_is_asked_for_the_returned_rows():
    for name, rows in (("clipcap", slice(3, None)), ("mapl", slice(9, None)), ("visual query", slice(0, 4))):
        module, inputs = made(CASES[name])
        blocks = getattr(module, "visual_blocks", None) or module.layers
        asked = []
        for block in blocks:
            block.register_forward_hook(lambda block, args, y, asked=asked: asked.append((*args[1:], y.shape[1])))
        y = module(*inputs)
        assert asked[-1] == (rows, y.shape[1]) and all(len(args) == 1 for args in asked[:-1])


# -- Meta-Mapper ---------------------------------------------------------------------------------------------------


def test_an_inner_loop_is_differentiated_twice():
    """Weights after one gradient step are passed in; the outer gradient goes through that step."""
    module, (x,) = made(CASES["meta"])
    module, x = module.double(), x.double()
    equation = meta(2)

    def outer(call):
        start = [t.detach().clone().requires_grad_() for t in module.vars]
        inner = call(x, start).square().mean()
        grads = torch.autograd.grad(inner, start, create_graph=True)
        updated = [t - 0.1 * g for t, g in zip(start, grads, strict=True)]
        loss = call(x + 1, updated).square().mean()
        found = torch.autograd.grad(loss, start)
        return {"y": loss.detach()[None]} | {str(i): g for i, g in enumerate(found)}

    with use_backend("reference"):
        got = outer(module)
    same_in_float64(got, outer(lambda x, vars: equation({}, x, vars)))


@on_triton
def test_kernels_say_how_to_differentiate_twice(device):
    module, (x,) = made(CASES["meta"], device)
    with use_backend("triton"):
        grads = torch.autograd.grad(module(x).sum(), list(module.vars), create_graph=True)
        with pytest.raises(RuntimeError, match='vlkernels.use_backend\\("reference"\\) to differentiate twice'):
            sum(g.sum() for g in grads).backward()


def test_dropout_follows_training_unless_asked_for():
    module, (x,) = made(CASES["meta"])
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    module = MetaMapper(16, 24, always=True).eval()
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not MetaMapper(16, 24, dropout=1.0).train()(x).any()  # the norms' biases start as zero


def test_weights_that_are_passed_in_are_used():
    module, (x,) = made(CASES["meta"])
    other = randomised(MetaMapper(16, 24, 4)).eval()
    assert torch.equal(module(x, list(other.vars)), other(x))
    assert torch.equal(module(x, tuple(module.vars)), module(x))


# -- inits and sizes -----------------------------------------------------------------------------------------------


def test_published_sizes_and_inits():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(ClipCapMLP(512, 768, 10, device="meta")) == 31_468_800
    assert count(ClipCapTransformer(512, 768, 40, 40, 8, device="meta")) == 53_587_968
    assert count(MAPLMapper(1024, 4096, device="meta")) == 3_431_680
    assert count(MetaMapper(512, 768, device="meta")) == 1_777_664
    assert count(VisualQuery(768, 4096, device="meta")) == 60_460_800
    module = MAPLMapper(14, 18, 64, 4, 3, 256)
    theirs = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    bound = theirs.self_attn.in_proj_weight.abs().max()
    for block in module.layers:
        assert torch.equal(block.qkv.weight, module.layers[0].qkv.weight)  # nn.TransformerEncoder copies one
        assert 0.9 * bound < block.qkv.weight.abs().max() < 1.1 * bound
        assert not block.qkv.bias.any() and not block.proj.bias.any()
    assert 0.95 < module.const.std() < 1.05
    module = MetaMapper(64, 64, 64)
    assert 0.9 < module.vars[0].std() < 1.1 and not any(module.vars[i].any() for i in (2, 4, 6, 8, 10, 12))
    bound = (6 / 128) ** 0.5
    assert 0.9 * bound < module.vars[1].abs().max() <= bound and bool((module.vars[9] == 1).all())
    assert 0.9 < ClipCapTransformer(8, 64, 64, 2, 1).prefix_const.std() < 1.1


def test_transformers_encoder_layer_is_mapls():
    """nn.TransformerEncoder's own keys load, and its numbers come out."""
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True), 2,
        enable_nested_tensor=False,
    ).double()  # fmt: skip
    randomised(theirs)
    ours = randomised(MAPLMapper(14, 18, 16, 2, 2, 5)).double()
    state = to_upstream(MAPL, ours.state_dict())
    state |= {f"transformer.{n}": t for n, t in theirs.state_dict().items()}
    ours.load_state_dict(to_ours(MAPL, state))
    x = torch.randn(2, 9, 14).double()
    y = theirs(torch.cat((ours.down(x), ours.const.expand(2, -1, -1)), 1))[:, -5:]
    same_in_float64({"y": ours(x).detach()}, {"y": ours.up(y).detach()})


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: ClipCapMLP(0, 8, 4), "prefix_size is 0"),
        (lambda: ClipCapMLP(14, 8, 4, num_layers=-1), "num_layers is -1"),
        (lambda: ClipCapMLP(14, 8, 4)(torch.randn(3, 13)), r"x has shape \(3, 13\); accepted: \(B, C\) with C = 14"),
        (lambda: ClipCapMLP(14, 8, 4)(torch.randn(2, 3, 14)), r"x has shape \(2, 3, 14\)"),
        (lambda: ClipCapTransformer(14, 15, 4, 3, 2), "the width is 15 with 8 heads"),
        (lambda: ClipCapTransformer(14, 16, 4, 3, 0), "num_layers is 0"),
        (lambda: ClipCapTransformer(14, 16, 4, 3, 1, level=2), "level is 2; accepted: 0, 1"),
        (lambda: ClipCapTransformer(14, 16, 4, 3, 1)(torch.randn(14)), r"x has shape \(14,\)"),
        (lambda: MAPLMapper(14, 18, 16, 3), "the width is 16 with 3 heads"),
        (lambda: MAPLMapper(14, 18, 16, 2, output_length=0), "output_length is 0"),
        (lambda: MAPLMapper(14, 18, 16, 2)(torch.randn(2, 14)), r"accepted: \(B, N, C\) with C = 14"),
        (lambda: VisualQuery(10, 20, query_len=0), "query_len is 0"),
        (lambda: VisualQuery(10, 20, v_embed_dim=10), "the width is 10 with 16 heads"),
        (lambda: VisualQuery(10, 20, v_embed_dim=16)(torch.randn(2, 9, 11)), "with C = 10"),
        (lambda: MetaMapper(16, 23), "dim_gpt_embedding is 23, .* a multiple of the head width"),
        (lambda: MetaMapper(4, 24), "dim_clip 4, num_heads 8"),
        (lambda: MetaMapper(16, 24, dropout=1.5), "dropout is 1.5"),
        (lambda: MetaMapper(16, 24)(torch.randn(3, 15)), r"x has shape \(3, 15\)"),
        (lambda: MetaMapper(16, 24)(torch.randn(3, 16), [torch.zeros(4, 16)]), r"vars has the shapes \[\(4, 16\)\]"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
