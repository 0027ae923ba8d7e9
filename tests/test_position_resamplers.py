"""Position resamplers: against upstream's equation in float64, masks and grids, upstream's names, and what users do."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from equations import (
    BACKENDS,
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
    of_module,
    on_triton,
    same_in_float64,
    slow_on_kernels,
    tokens,
)
from torch import nn

from vlkernels import use_backend
from vlkernels.integrations.checkpoints import to_upstream
from vlkernels.modules import MiniCPMVResampler, OmniLMMResampler, QwenVLResampler
from vlkernels.modules._positions import sincos_1d, sincos_2d
from vlkernels.testing import meter

pytestmark = pytest.mark.usefixtures("on_the_reference")
OPS = ("cross_attention", "linear_projector")
EPS = 1e-6


# -- the equations, as upstream computes them ----------------------------------------------------------------------


def resample(p, x, q, keys, values, heads, added=None, pool=""):
    """One attention over whole tensors, then ln_post and proj."""
    weights = p[f"{pool}attn.in_proj_weight"].chunk(3)
    biases = p[f"{pool}attn.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, keys, values), weights, biases, strict=True))
    y = lin(p, f"{pool}attn.out_proj", attention(q, k, v, heads, added=added))
    return layer_norm(p, "ln_post", y, EPS) @ p["proj"]


def values_of(p, x, pool=""):
    name = f"{pool}kv_proj"
    return layer_norm(p, f"{pool}ln_kv", lin(p, name, x) if f"{name}.weight" in p else x, EPS)


def qwen(heads, pool="attn_pool."):
    def equation(p, x, attn_mask=None):
        table = p[f"{pool}pos_embed"]
        g, side = math.isqrt(len(table)), math.isqrt(x.shape[1])
        keys = table
        if g != side:
            grid = table.reshape(1, g, g, -1).permute(0, 3, 1, 2)
            wide = grid if grid.dtype == torch.float64 else grid.float()
            grid = F.interpolate(wide, size=(side, side), mode="bicubic", align_corners=False).to(grid.dtype)
            keys = grid.permute(0, 2, 3, 1).flatten(0, 2)
        c = values_of(p, x, pool)
        q = layer_norm(p, f"{pool}ln_q", p[f"{pool}query"], EPS).expand(len(x), -1, -1)
        return resample(p, x, q + table, c + keys, c, heads, attn_mask, pool)

    return equation


def minicpmv(heads):
    def equation(p, x, sizes):
        c = values_of(p, x)
        keys, added = [], torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
        for b, (h, w) in enumerate(sizes.tolist()):
            table = [torch.cat((sincos_1d(torch.tensor([j]), c.shape[-1] // 2),
                                sincos_1d(torch.tensor([i]), c.shape[-1] // 2)), 1)
                     for i in range(h) for j in range(w)]  # fmt: skip
            position = F.pad(torch.cat(table), (0, 0, 0, x.shape[1] - h * w)).to(c)
            keys.append(c[b] + position)
            added[b, ..., h * w :] = -math.inf
        q = layer_norm(p, "ln_q", p["query"], EPS).expand(len(x), -1, -1)
        return resample(p, x, q, torch.stack(keys), c, heads, added)

    return equation


def with_mask(M, N, all_masked=None):
    def inputs():
        mask = torch.zeros(M, N)
        mask[torch.rand(M, N) < 0.3] = -1e9 if all_masked is None else -math.inf
        mask[:, 0] = 0.0
        return torch.randn(2, N, 12), mask

    return inputs


def images(*sizes, N=None, width=12):
    def inputs():
        count = N or max(h * w for h, w in sizes)
        return torch.randn(len(sizes), count, width), torch.tensor(sizes)

    return inputs


QWEN, OMNI, CPM = "resampler.qwen_vl", "resampler.omnilmm", "resampler.minicpmv26"
CASES = {
    "qwen": Variant(QWEN, lambda: QwenVLResampler(3, 16, 2, 12), qwen(2), tokens(2, 9, 12), OPS),
    "qwen one width, head dim 6": Variant(QWEN, lambda: QwenVLResampler(2, 12, 2), qwen(2), tokens(2, 4, 12), OPS),
    "qwen up, head dim 10": Variant(QWEN, lambda: QwenVLResampler(3, 20, 2, 12), qwen(2), tokens(3, 25, 12), OPS),
    "qwen down": Variant(QWEN, lambda: QwenVLResampler(5, 16, 4, 12), qwen(4), tokens(2, 9, 12), OPS),
    "qwen level 1": Variant(QWEN, lambda: QwenVLResampler(3, 20, 2, 12, level=1), qwen(2), tokens(3, 25, 12), OPS),
    "qwen mask": Variant(QWEN, lambda: QwenVLResampler(3, 16, 2, 12), qwen(2), with_mask(9, 36), OPS),
    "omnilmm": Variant(OMNI, lambda: OmniLMMResampler(2, 24, 3, 12), qwen(3, ""), tokens(2, 16, 12), OPS),
    "minicpmv": Variant(CPM, lambda: MiniCPMVResampler(5, 16, 2, 12, max_size=(4, 6)), minicpmv(2),
                        images((3, 4), (2, 5), (1, 1)), OPS),
    "minicpmv level 1": Variant(CPM, lambda: MiniCPMVResampler(5, 16, 2, 12, max_size=(4, 6), level=1), minicpmv(2),
                                images((3, 4), (2, 5), (1, 1)), OPS),
    "minicpmv one size": Variant(CPM, lambda: MiniCPMVResampler(4, 12, 2, max_size=(4, 6)), minicpmv(2),
                                 images((2, 5), (2, 5)), OPS),
    "minicpmv grows, more padding": Variant(CPM, lambda: MiniCPMVResampler(4, 20, 2, 12, max_size=(2, 2)), minicpmv(2),
                                            images((3, 4), (2, 7), N=17), OPS),
}  # fmt: skip
FAMILIES = ("qwen up, head dim 10", "minicpmv level 1")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64_by_hand(name, backend, device):
    check_rule(CASES[name], backend, device)


@pytest.mark.parametrize("name", CASES)
def test_folded_positions_are_upstreams_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_state_dict_goes_to_upstream_and_back(name):
    check_names(CASES[name])


@pytest.mark.parametrize("name, backend", slow_on_kernels(FAMILIES, ["minicpmv level 1"]))
def test_autocast(name, backend, device):
    check_rule(CASES[name], backend, device, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen", "qwen mask", "minicpmv level 1"])
def test_compiles_in_one_graph(name, device):
    sizes = ([(3, 4), (2, 5), (1, 1)],) if name == "minicpmv level 1" else ()
    # torch decomposes the bicubic interpolation into other sums
    check_one_graph(CASES[name], "reference", device, *sizes, bits=name != "qwen mask")


@on_triton
def test_compiles_in_one_graph_with_kernels(device):
    check_one_graph(CASES["qwen"], "triton", device)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_and_copies(name):
    check_checkpointing(CASES[name])
    check_copies(CASES[name])


@pytest.mark.parametrize("name", ["qwen", "minicpmv"])
def test_a_lora_a_subclass_or_a_hook_on_a_child_acts(name):
    check_children(CASES[name])


@pytest.mark.parametrize("name", ["qwen mask", "minicpmv"])
def test_the_attention_itself_may_be_hooked_or_replaced(name):
    module, inputs = made(CASES[name])
    exact = of_module(module.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs))
    seen = []
    module.attn.register_forward_hook(lambda *args: seen.append(1))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    same_in_float64(of_module(module, inputs), exact)
    assert seen

    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            y, weights = super().forward(*args, **kwargs)
            return y + 1, weights

    module.attn.__class__ = Own
    assert not torch.equal(module(*inputs), exact["y"])


# -- levels --------------------------------------------------------------------------------------------------------


@on_triton
def test_level_1_keeps_no_keys_and_values():
    """Per token: level 0 what kv_proj gives, keys and values, level 1 the first alone and the two ones of its place."""
    B, N, D = 2, 36, 16
    apart = {}
    for level in (0, 1):
        module = QwenVLResampler(6, D, 2, 12, level=level)
        x = torch.randn(B, N, 12)
        with use_backend("triton"):
            apart[level] = meter.saved_bytes(lambda x=x, m=module: m(x), [x, *module.parameters()])
    places = N * 16 + 16 * D  # 12 ones-or-zeros a token, of rows of 16; what their weights are, once
    assert apart[0] - apart[1] >= 4 * (2 * B * N * D - places)


def test_level_1_with_a_table_of_no_grid_keeps_the_keys():
    module = made(CASES["qwen level 1"])[0].double()
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    assert module._on_grid()
    with torch.no_grad():
        module.pos_embed[1, 3] += 1
    twin = QwenVLResampler(3, 20, 2, 12).double()
    twin.load_state_dict(module.state_dict())
    assert not module._on_grid() and torch.equal(module(x), twin(x))
    fresh = QwenVLResampler(3, 20, 2, 12, level=1).double()
    for table in (fresh.pos_embed, module.pos_embed, twin.pos_embed):
        table.requires_grad_()
    with torch.no_grad():
        twin.load_state_dict(fresh.state_dict())
    grads = [torch.autograd.grad(m(x).sum(), m.pos_embed)[0] for m in (fresh, twin)]
    assert torch.equal(*grads) and grads[0].abs().max() > 0


# -- positions -----------------------------------------------------------------------------------------------------


def test_position_tables():
    """Column half first; sines, then cosines; ten thousand to the -k / K."""
    table = sincos_2d(3, 5, 8)
    assert table.shape == (3, 5, 8) and table.dtype == torch.float64
    for i, j in ((0, 0), (2, 3), (1, 4)):
        for half, place in enumerate((j, i)):
            for k in range(2):
                angle = place * 10000 ** (-k / 2)
                assert float(table[i, j, 4 * half + k]) == pytest.approx(math.sin(angle), rel=1e-12, abs=0)
                assert float(table[i, j, 4 * half + 2 + k]) == pytest.approx(math.cos(angle), rel=1e-12, abs=0)
    module = QwenVLResampler(3, 8, 2)
    assert torch.equal(module.pos_embed, sincos_2d(3, 3, 8).flatten(0, 1).float())
    assert not module.pos_embed.requires_grad


def test_interpolated_tables_are_kept_beside_the_parameter_until_it_changes():
    module = QwenVLResampler(3, 16, 2).double()
    x, larger = torch.randn(2, 16, 16).double(), torch.randn(2, 25, 16).double()
    kept = module._resized
    y = module(x)
    module(larger)
    assert len(kept) == 2 and set(kept._tables) == {4, 5}
    first = kept._tables[4]
    module(x)
    assert kept._tables[4] is first
    assert not any("resized" in name for name in module.state_dict())
    assert len(copy.deepcopy(module)._resized) == 0
    # a change in place, by loading, of dtype: each time the numbers of a fresh module
    with torch.no_grad():
        module.pos_embed.mul_(2)
    moved = module(x)
    fresh = QwenVLResampler(3, 16, 2).double()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(moved, fresh(x)) and not torch.equal(moved, y) and set(kept._tables) == {4}
    with torch.no_grad():
        fresh.pos_embed.mul_(3)
    module.load_state_dict(fresh.state_dict())
    assert torch.equal(module(x), fresh(x))
    module.float()(x.float())
    assert kept._tables[4].dtype == torch.float32
    # kept in inference, used in training
    module = QwenVLResampler(3, 16, 2)
    with torch.inference_mode():
        module(x.float())
    module(x.float()).sum().backward()
    assert len(module._resized) == 1
    # a trained table gets its gradient
    module.pos_embed.requires_grad_()
    module(x.float()).sum().backward()
    assert module.pos_embed.grad.abs().max() > 0


def test_the_table_grows_and_is_no_state():
    module = MiniCPMVResampler(4, 12, 2, max_size=(2, 3)).double()
    small = module.pos_embed.clone()
    assert "pos_embed" not in module.state_dict()
    module(torch.randn(1, 12, 12).double(), [(1, 12)])
    assert module.pos_embed.shape == (2, 12, 12)
    assert torch.equal(module.pos_embed[:2, :3], sincos_2d(2, 3, 12)) and small.shape == (2, 3, 12)
    before = module.pos_embed
    module(torch.randn(1, 12, 12).double(), torch.tensor([[2, 6]]))
    assert module.pos_embed is before
    lazily = MiniCPMVResampler(4, 12, 2, max_size=(2, 3), device="meta").to_empty(device="cpu")
    lazily.reset_parameters()
    assert torch.equal(lazily.pos_embed, sincos_2d(2, 3, 12).float())


def test_what_padding_holds_changes_nothing():
    module, (x, sizes) = made(CASES["minicpmv"])
    y = module(x, sizes)
    other = x.clone()
    for b, (h, w) in enumerate(sizes.tolist()):
        other[b, h * w :] = 100.0
    assert torch.equal(module(other, sizes), y)
    assert torch.equal(module(x, sizes.tolist()), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gives_no_nan(backend, device):
    """Its attention is zero, so that it is out_proj's bias after ln_post and proj."""
    module, (x, mask) = made(CASES["qwen mask"], device)
    mask[4] = -math.inf
    with use_backend(backend):
        got = of_module(module, (x, mask))
    assert all(t.isfinite().all() for t in got.values())
    bare = layer_norm(dict(module.named_parameters()), "ln_post", module.attn.out_proj.bias, EPS) @ module.proj
    error = (got["y"][:, 4].double() - bare.double()).abs().max()
    assert error <= 64 * float(torch.finfo(torch.float32).eps) * float(bare.detach().abs().max())


@pytest.mark.parametrize("name", ["qwen", "minicpmv"])
def test_no_image(name):
    module, inputs = made(CASES[name])
    empty = (inputs[0][:0], *(s[:0] for s in inputs[1:]))
    got = of_module(module, empty) if name == "qwen" else {"y": module(*empty)}
    assert got["y"].shape == (0, module.num_queries, module.embed_dim)


def test_published_sizes_and_inits():
    module = QwenVLResampler(16, 4096, 32, 1664, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 92_839_936
    module = QwenVLResampler(4, 64, 4, 32)
    for weight in (module.query, module.kv_proj.weight, module.attn.out_proj.weight):
        assert 0.015 < weight.std() < 0.025 and weight.abs().max() < 2.0
    assert not module.attn.out_proj.bias.any() and not module.attn.in_proj_bias.any()
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.9 * bound < module.attn.in_proj_weight.abs().max() <= bound
    assert 0.9 * 64**-0.5 < module.proj.std() < 1.1 * 64**-0.5
    names = set(to_upstream(QWEN, module.state_dict()))
    assert names >= {"attn_pool.kv_proj.weight", "attn_pool.attn.in_proj_weight", "ln_post.bias", "proj"}


# -- bad input -----------------------------------------------------------------------------------------------------


def qwen_call(*args):
    return QwenVLResampler(2, 8, 2, 6)(*args)


def cpm_call(sizes, N=12):
    return MiniCPMVResampler(4, 8, 2, 6)(torch.randn(2, N, 6), sizes)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: QwenVLResampler(0, 8, 2), "grid_size is 0"),
        (lambda: QwenVLResampler(2, 8, 3), "embed_dim is 8 with 3 heads"),
        (lambda: QwenVLResampler(2, 6, 2), "embed_dim is 6; accepted: a multiple of 4"),
        (lambda: qwen_call(torch.randn(2, 30, 6)), "x has 30 tokens; accepted: a square number"),
        (lambda: qwen_call(torch.randn(2, 0, 6)), "x has 0 tokens"),
        (lambda: qwen_call(torch.randn(2, 9, 8)), r"accepted: \(B, N, C\) with C = 6"),
        (lambda: qwen_call(torch.randn(9, 6)), r"x has shape \(9, 6\)"),
        (lambda: qwen_call([1.0]), "x must be a torch.Tensor, got list"),
        (lambda: qwen_call(torch.randn(2, 9, 6), torch.zeros(9, 9)), r"attn_mask has shape \(9, 9\); .* \(4, 9\)"),
        (lambda: qwen_call(torch.randn(2, 9, 6), torch.ones(4, 9).bool()), "attn_mask has dtype torch.bool"),
        (lambda: MiniCPMVResampler(0, 8, 2), "num_queries is 0"),
        (lambda: MiniCPMVResampler(4, 8, 2, max_size=(0, 3)), r"max_size is \(0, 3\)"),
        (lambda: cpm_call([(3, 4)]), r"tgt_sizes is .* each of the 2 images"),
        (lambda: cpm_call([(3, 4), (3,)]), "tgt_sizes is"),
        (lambda: cpm_call(torch.tensor([3, 4])), "tgt_sizes is"),
        (lambda: cpm_call([(3, 4), (0, 4)]), r"tgt_sizes\[1\] is \(0, 4\); accepted: 1 or more"),
        (lambda: cpm_call([(3, 4), (-1, -4)]), r"tgt_sizes\[1\] is \(-1, -4\)"),
        (lambda: cpm_call([(3, 5), (1, 4)]), r"tgt_sizes\[0\] is \(3, 5\); .* the 12 tokens"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
