"""Gated cross-attention layers: identity at closed gates, one product for all keys, what is kept, masks, bad input."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import vlkernels
from benchmarks.upstream_blocks import FlamingoBlock
from vlkernels.modules import (
    GatedCrossAttentionBlock,
    IdeficsGatedCrossAttentionLayer,
    MediaContext,
    MediaMask,
    MllamaCrossAttentionDecoderLayer,
    mllama_mask,
)
from vlkernels.ops.media_cross_attention import spans
from vlkernels.testing import compare, meter

torch.set_num_threads(1)
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")


def flamingo(**words):
    return GatedCrossAttentionBlock(24, 20, 8, 2, 2, **words)


def idefics(**words):
    return IdeficsGatedCrossAttentionLayer(24, 40, 3, 20, **words)


def mllama(**words):
    return MllamaCrossAttentionDecoderLayer(24, 40, 4, 2, **words)


LOCATIONS = torch.zeros(2, 9, dtype=torch.bool)
LOCATIONS[0, 2] = LOCATIONS[0, 6] = LOCATIONS[1, 0] = True


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(kind, dtype=torch.float32, **words):
    """A layer with random parameters, its text, its media and how to call it."""
    torch.manual_seed(1)
    make = {"flamingo": flamingo, "idefics": idefics, "mllama": mllama}[kind]
    layer = make(**words)
    for p in layer.parameters():
        p.data.normal_(std=0.3) if p.dim() > 1 else p.data.normal_(0.8, 0.2)
    seen = drawn(2, 9, 2, seed=5) > 0
    seen[0, 1] = False
    layer = layer.to(dtype)
    x = drawn(2, 9, 24, dtype=dtype)
    if kind == "flamingo":
        return layer, x, drawn(2, 2, 4, 20, seed=1, dtype=dtype), lambda m, x, media: m(x, media, LOCATIONS)
    if kind == "idefics":
        return layer, x, drawn(2, 8, 20, seed=1, dtype=dtype), lambda m, x, media: m(x, media, seen)
    return layer, x, drawn(2, 8, 24, seed=1, dtype=dtype), lambda m, x, media: m(x, media, seen[:, :, None])


def step(layer, x, media, call, autocast=None):
    x, media = (t.detach().requires_grad_() for t in (x, media))
    layer.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = call(layer, x, media)
    y.backward(drawn(*y.shape, seed=7, dtype=torch.float32).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "dmedia": media.grad} | {n: p.grad for n, p in layer.named_parameters()}


@interpreted
@pytest.mark.parametrize(
    "kind, words, autocast",
    [
        ("flamingo", {"level": 1}, None),
        ("flamingo", {"only_attend_immediate_media": False}, torch.bfloat16),
        ("idefics", {"alpha_type": "vector", "qk_layer_norms": True}, torch.bfloat16),
        ("mllama", {}, None),
    ],
)
def test_rule(kind, words, autocast):
    """Kernels in the limits that the reference's errors in the same dtypes give, over five draws; against float64."""
    layer, _, _, call = case(kind, **words)
    double, width = copy.deepcopy(layer).double(), 24 if kind == "mllama" else 20
    shape = (2, 2, 4, width) if kind == "flamingo" else (2, 8, width)
    baseline, scale = {}, {}
    for seed in reversed(compare.SEEDS):
        x, media = drawn(2, 9, 24, seed=seed), drawn(*shape, seed=seed + 10)
        exact = {n: t.clone() for n, t in step(double, x.double(), media.double(), call).items()}
        with vlkernels.use_backend("reference"):
            usual = step(layer, x, media, call, autocast)
        for n, truth in exact.items():
            baseline[n] = max(baseline.get(n, 0.0), compare.worst(usual[n], truth)[0])
            scale[n] = max(scale.get(n, 0.0), float(truth.abs().max()))
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(layer, x, media, call, autocast)
    assert counts["media_cross_attention_bwd_dkv_kernel"] and counts["mlp_projector_act_bwd_kernel"]
    for n, truth in exact.items():
        limit = 2 * baseline[n] + 4 * compare.ulp(scale[n], autocast or torch.float32)
        assert compare.worst(got[n], truth)[0] <= limit, n


@interpreted
@pytest.mark.parametrize("kind", ["flamingo", "idefics", pytest.param("mllama", marks=pytest.mark.slow)])
def test_identity_at_closed_gates(kind):
    """With gates of zero y is x bit for bit; yet the gates learn."""
    for words in ({}, {"alpha_type": "vector"}) if kind == "idefics" else ({},):
        layer, x, media, call = case(kind, torch.bfloat16, **words)
        for name, p in layer.named_parameters():
            if "gate" in name.rpartition(".")[2].split("_") or name.startswith("alpha"):
                p.data.zero_()
        for backend in ("reference", "triton"):
            with vlkernels.use_backend(backend):
                found = step(layer, x, media, call)
            assert torch.equal(found["y"], x)
            gates = [g for n, g in found.items() if n.endswith("_gate") or n.startswith("alpha")]
            assert len(gates) == 2 and all(g.any() for g in gates)
            assert not any(g.any() for n, g in found.items() if n.endswith(("to_q.weight", "q_proj.weight")))


def by_hand(layer, x, media, locations, immediate):
    """OpenFlamingo's two steps of masking, token by token."""
    B, T, J = *x.shape[:2], media.shape[1]
    attn, y = layer.attn, torch.zeros_like(x)
    heads, n = 2, media.shape[2]
    q = attn.to_q(attn.norm(x)).view(B, T, heads, -1)
    k, v = attn.to_kv(media.flatten(1, 2)).view(B, J * n, 2, heads, -1).unbind(2)
    for b in range(B):
        for t in range(T):
            time = int(locations[b, : t + 1].sum())
            seen = [j for j in range(J) if (j + 1 == time if immediate else j + 1 <= time)]
            if immediate and time == 0:
                continue
            if not seen:  # every key has the same masked score
                out = v[b].mean(0)
            else:
                keys = torch.cat([torch.arange(j * n, j * n + n) for j in seen])
                w = (torch.einsum("hk,nhk->hn", q[b, t], k[b, keys]) * q.shape[-1] ** -0.5).softmax(-1)
                out = torch.einsum("hn,nhk->hk", w, v[b, keys])
            y[b, t] = attn.to_out(out.flatten())
    h = x + layer.attn_gate.tanh() * y
    return h + layer.ff_gate.tanh() * layer.ff(h)


@interpreted
@pytest.mark.parametrize("immediate", [True, False])
def test_masking_by_hand(immediate):
    """Before the first medium, within, and past the last one, on both backends."""
    layer, x, media, _ = case("flamingo", only_attend_immediate_media=immediate, strict=False)
    locations = LOCATIONS.clone()
    locations[0, 7] = locations[0, 8] = True  # two more than there are media
    layer, x, media = layer.double(), x.double(), media.double()
    want = by_hand(layer, x, media, locations, immediate)
    with vlkernels.use_backend("reference"):
        assert compare.worst(layer(x, media, locations), want)[0] <= 64 * compare.ulp(float(want.abs().max()), x.dtype)
    single = copy.deepcopy(layer).float()
    with vlkernels.use_backend("reference"):
        usual = single(x.float(), media.float(), locations)
    with vlkernels.use_backend("triton"):
        assert compare.beside("y", single(x.float(), media.float(), locations), usual, want).ok


@interpreted
def test_cached_media():
    """Generation: every token stands after all media tokens; without locations all media are seen."""
    layer, x, media, _ = case("flamingo")
    with vlkernels.use_backend("triton"):
        whole = layer(x, media, LOCATIONS)
        last = layer(x[:, 8:], media, LOCATIONS, True)
        assert compare.beside("last", last, whole[:, 8:], whole[:, 8:].double()).ok
        everything = layer(x[:, :1], media, None, True)
    with vlkernels.use_backend("reference"):
        assert compare.beside("all", everything, layer(x[:, :1], media, None, True), everything.double()).ok
    with pytest.raises(ValueError, match="use_cached_media=True only"):
        layer(x, media)


@interpreted
def test_one_product_for_all_layers():
    """A context of several blocks: their keys and values in one product, the same numbers as one by one."""
    blocks = nn.ModuleList(case("flamingo")[0] for _ in range(3))
    for i, p in enumerate(blocks.parameters()):
        p.data.mul_(1 + 0.01 * i)
    _, x, media, _ = case("flamingo")
    mask = MediaMask.of_locations(LOCATIONS, 2, 4, 9)
    with vlkernels.use_backend("triton"), vlkernels.backends.record() as calls:
        context = MediaContext.of(blocks, media, mask)
        got, want = x, x
        for block in blocks:
            got = block(got, context=context)
        assert calls.count(("multi_layer_kv", "triton")) == 1
        for block in blocks:
            want = block(want, media, LOCATIONS)
    assert compare.beside("y", got, want, want.double()).ok
    with pytest.raises(ValueError, match="made for other layers"):
        case("flamingo")[0](x, context=context)


@interpreted
def test_children_with_hooks_are_called():
    layer, x, media, call = case("flamingo")
    want, seen = call(layer, x, media), []
    for child in (layer.attn.to_q, layer.attn.to_kv, layer.attn.to_out, layer.ff[1]):
        child.register_forward_hook(lambda m, *_: seen.append(m))
    with vlkernels.use_backend("triton"):
        assert compare.beside("y", call(layer, x, media), want, want.double()).ok
    assert len(seen) == 4


@interpreted
@pytest.mark.parametrize("kind", ["flamingo", pytest.param("idefics", marks=pytest.mark.slow)])
def test_compiles(kind):
    layer, x, media, call = case(kind)
    torch._dynamo.reset()
    with vlkernels.use_backend("triton"):
        want = call(layer, x, media)
        compiled = torch.compile(lambda x, media: call(layer, x, media), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, media), want)


@interpreted
def test_checkpointing_and_dropout():
    """A recomputed layer with dropout draws the same masks; without training there is none."""
    layer, x, media, _ = case("idefics", dropout=0.4)
    x, media, call = x[:1, :3], media[:1], lambda m, x, media: m(x, media)
    assert torch.equal(call(layer.eval(), x, media), call(layer, x, media))
    layer.train()
    with vlkernels.use_backend("triton"):
        found = []
        for kept in (False, True):
            torch.manual_seed(3)
            run = lambda m, x, media: torch.utils.checkpoint.checkpoint(call, m, x, media, use_reentrant=False)  # noqa: E731
            found.append(step(layer, x, media, run if kept else call))
            layer.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


# -- what a block costs --------------------------------------------------------------------------------------------


def counted(block, T: int, flops: bool) -> tuple[int, int]:
    """(saved bytes, FLOPs of both ways) of a block, or of stock code over it, on T tokens after one of five media."""
    x, media = (drawn(1, *n, dtype=torch.bfloat16).requires_grad_() for n in ((T, 128), (5, 16, 32)))
    locations, out = torch.zeros(1, T, dtype=torch.bool), []
    locations[0, 0] = True

    def run():
        out.append(block(x, media, locations))
        return out[0]

    if not flops:
        return meter.saved_bytes(run, [media, *block.parameters()]), 0
    with meter.traffic() as forward:
        run()
    with meter.traffic() as backward:
        out[0].backward(torch.ones_like(out[0]))
    return 0, forward.flops + backward.flops


@interpreted
def test_saved_and_flops_at_flamingos_proportions():
    """A 32nd of OpenFlamingo-9B's widths: of the bytes that eager keeps for each text token, its input among them, the
    block keeps at most 0.42 at level 0, which computes no product twice, and 0.16 at level 1."""
    kept, flops = {}, {}
    for name in ("eager", 0, 1):
        block = GatedCrossAttentionBlock(128, 32, 16, 1, level=0 if name == "eager" else name, dtype=torch.bfloat16)
        model = FlamingoBlock(block) if name == "eager" else block
        with contextlib.nullcontext() if name == "eager" else vlkernels.use_backend("triton"):
            # keys, values and what each medium costs stay as they are with more text
            kept[name] = (counted(model, 32, False)[0] - counted(model, 16, False)[0]) / 16
            flops[name] = counted(model, 32, True)[1]
    assert kept[0] <= 0.42 * kept["eager"] and kept[1] <= 0.16 * kept["eager"], kept
    assert flops[0] <= 1.02 * flops["eager"], flops
    # the feed-forward's first product once more, of six of its size
    assert flops[1] <= 1.02 * 7 / 6 * flops["eager"], flops


# -- the tokens' media ---------------------------------------------------------------------------------------------


def test_spans():
    time = spans.text_time(torch.tensor([[0, 1, 0, 1, 1]]) != 0)
    assert time.dtype == torch.int32 and time.tolist() == [[0, 1, 1, 2, 3]]
    assert spans.spans_of_time(time, 2).tolist() == [[[0, 0], [0, 1], [0, 1], [1, 2], [1, 0]]]
    assert spans.spans_of_time(time, 2, False).tolist() == [[[1, 0], [0, 1], [0, 1], [0, 2], [0, 2]]]
    seen = torch.tensor([[[0, 1, 0, 1], [0, 0, 0, 0]]]) != 0
    for empty, last in (("mean", [1, 0]), ("zero", [0, 0]), ("all", [0, 4])):
        visible, span = spans.spans_of_visible(seen, empty)
        assert span.tolist() == [[[1, 4], last]] and bool(visible[0, 1].all()) == (empty == "all")
    with pytest.raises(ValueError, match="empty is 'none'; accepted: mean, zero, all"):
        spans.spans_of_visible(seen, "none")


@interpreted
def test_other_media_are_not_read():
    """Tiles of keys that no token of a tile sees are skipped: NaN there reaches nobody, either way."""
    q = drawn(1, 5, 1, 16).requires_grad_()
    k, v = (drawn(1, 192, 1, 16, seed=s) for s in (1, 2))
    k[:, :64] = v[:, :64] = k[:, 128:] = v[:, 128:] = float("nan")
    span = torch.tensor([[1, 2]], dtype=torch.int32).expand(1, 5, 2)
    with vlkernels.use_backend("triton"):
        y = vlkernels.media_cross_attention(q, k, v, span, tokens=64)
        y.sum().backward()
    assert not y.isnan().any() and not q.grad.isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: a | {"media": a["media"][:1]},
            r"media has shape \(1, 2, 4, 20\); accepted: \(B, J, n, C\) with B = 2",
        ),
        (lambda a: a | {"media": None}, "media must be a torch.Tensor, got NoneType"),
        (lambda a: a | {"media": a["media"][..., :8]}, "and C = 20"),
        (lambda a: a | {"x": a["x"][..., :8]}, r"x has shape \(2, 9, 8\)"),
        (lambda a: a | {"media_locations": LOCATIONS[:, :5]}, r"media_locations has shape \(2, 5\); .* T = 9"),
        (lambda a: a | {"media_locations": LOCATIONS[:1]}, "media_locations has 1 samples, media 2"),
        (lambda a: a | {"media_locations": LOCATIONS * 0.5}, "media_locations has dtype torch.float32"),
        (lambda a: a | {"media_locations": ~LOCATIONS}, "sample 1 has 8 media tokens, media holds 2"),
    ],
)
def test_bad_input(change, message):
    layer, x, media, _ = case("flamingo")
    with pytest.raises((TypeError, ValueError), match=message):
        layer(**change({"x": x, "media": media, "media_locations": LOCATIONS}))


def test_bad_masks():
    layer, x, media, _ = case("mllama")
    with pytest.raises(ValueError, match="8 vision tokens of 3 tiles"):
        layer(x, media, torch.ones(2, 9, 3, 1))
    with pytest.raises(ValueError, match=r"span is of \(2, 4\)"):
        layer(x, context=MediaContext.of([layer], media, mllama_mask(torch.ones(2, 4, 2, 1), 8)))
    other, x, media, _ = case("idefics")
    with pytest.raises(ValueError, match=r"image_attention_mask has shape \(2, 9, 3\) over 8 image tokens"):
        other(x, media, torch.ones(2, 9, 3))
    with pytest.raises(ValueError, match=r"the gate has shape \(2, 4\)"):
        other(x, media, torch.ones(2, 9, 2), torch.ones(2, 4))
    with pytest.raises(ValueError, match="alpha_type is 'row'; accepted: float, vector"):
        idefics(alpha_type="row")
