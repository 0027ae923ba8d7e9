"""Q-Former: upstream's equations by hand, transformers' models beside it, masks, caches and checkpoints."""

import copy

import pytest
import torch
from qformer_by_hand import (
    BACKENDS,
    LAVIS,
    OPS,
    SLOW_BACKENDS,
    B,
    C,
    D,
    H,
    M,
    V,
    attend,
    close64,
    data,
    feed,
    gradients,
    hand_gradients,
    make,
    norm,
    ours,
    penalty,
    randomised,
)
from torch import nn

from vlkernels import backends, use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import QFormer
from vlkernels.modules.qformer import LOWEST
from vlkernels.testing import meter
from vlkernels.testing.compare import SEEDS, assert_model, beside, ulp


@pytest.fixture(autouse=True)
def _on_the_reference():
    """Where a test names no backend: its subject is the module."""
    with use_backend("reference"):
        yield


MODES = ["queries", "text", "both", "joint", "two passes", "three passes"]


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("mode, level, masked", [
    *((mode, 0, LAVIS) for mode in MODES), ("queries", 1, LOWEST), ("both", 1, LOWEST), ("two passes", 1, LAVIS),
])  # fmt: skip
def test_against_float64_by_hand(mode, level, masked, backend, device, poisoned):
    generation = mode not in ("queries", "text", "both")
    module = make(lm_head=generation, masked=masked, level=level).to(device)
    inputs = data(device)
    leaves = dict(module.named_parameters())
    inputs[0].requires_grad_(), inputs[1].requires_grad_()
    with use_backend(backend), backends.record() as calls:
        y = ours(mode, module, *inputs)
        got = gradients(y, leaves | {"x": inputs[0], "queries": inputs[1]})
    assert set(calls) == {(op, backend) for op in OPS - ({"multi_layer_kv"} if mode == "text" or level else set())}
    value = None if masked == LOWEST else masked
    hand = "joint" if generation else mode
    draws = [inputs, *(data(device) for _ in range(4))]
    pairs = [
        [hand_gradients(hand, module, drawn, dtype, value) for dtype in (torch.float32, torch.float64)]
        for drawn in draws
    ]
    assert_model(got, pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_of_batch_one_are_exact(causal):
    """And they are computed once: the first self-attention has a batch of one."""
    module, (x, queries, ids, keep, seen) = make().double(), data(dtype=torch.float64)
    for text in ((), (ids, keep)):
        once, apart = (queries.clone().requires_grad_() for _ in range(2))
        a = module(once, x, *text, image_mask=seen, causal=causal and bool(text), use_cache=True)
        b = module(apart.expand(B, -1, -1), x, *text, image_mask=seen, causal=causal and bool(text), use_cache=True)
        close64(a.hidden, b.hidden)
        close64(*(torch.autograd.grad(t.hidden.square().sum(), leaf)[0] for t, leaf in ((a, once), (b, apart))))
        assert a.cache.layers[0][0].shape[0] == 1 and a.cache.layers[1][0].shape[0] == B
        assert b.cache.layers[0][0].shape[0] == B


def test_hoisting_saves_the_first_self_attention():
    module, (x, queries, *_) = make(text=False), data()
    counts = []
    for q in (queries, queries.expand(B, -1, -1)):
        with meter.traffic() as traffic, torch.no_grad(), use_backend("reference"):
            module(q, x)
        counts.append(traffic.flops)
    # q, k, v, out of the self-attention and q of the cross-attention, 2 D² each, and the two products of attention
    assert counts[1] - counts[0] == (B - 1) * M * (5 * 2 * D * D + 4 * M * D)


def test_dropout_and_a_batch_of_queries_are_not_hoisted():
    module, (x, queries, *_) = make(attention_dropout=0.2).train(), data()
    found = module(queries, x[:1].expand(B, -1, -1), use_cache=True)
    assert found.cache.layers[0][0].shape[0] == B
    # each image's queries have a dropout of their own
    assert not torch.equal(found.queries[0], found.queries[1])
    module.eval()
    found = module(queries, x[:1].expand(B, -1, -1))
    assert torch.equal(found.queries[0], found.queries[1])


@pytest.mark.parametrize("level", [0, 1])
def test_an_index_is_a_gather_of_the_images(level):
    module, (x, queries, ids, keep, seen) = make(level=level).double(), data(dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 1, 2, 2])
    ids, keep = ids.repeat(2, 1), keep.repeat(2, 1)
    x.requires_grad_()
    image = module.image_kv(x, seen)
    a = module(queries, image, ids, keep, index=index).hidden
    b = module(queries, x[index], ids, keep, seen[index]).hidden
    close64(a, b)
    close64(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (a, b)))
    # queries alone take the batch of the index
    close64(module(queries, image, index=index).queries, module(queries, x, image_mask=seen).queries[index])


def test_wanted_states_only():
    module, (x, queries, ids, keep, seen) = make(lm_head=True).double(), data(dtype=torch.float64)
    full = module(queries, x, ids, keep, seen)
    flops = []
    for want in (("queries", "text"), ("queries",), ("text",), ()):
        with meter.traffic() as traffic, torch.no_grad(), use_backend("reference"):
            found = module(queries, x, ids, keep, seen, want=want, use_cache=True)
        flops.append(traffic.flops)
        for name in ("queries", "text"):
            state = getattr(found, name)
            assert (state is None) == (name not in want)
            if state is not None:
                close64(state, getattr(full, name))
        assert len(found.cache.layers) == 3
    assert flops[0] > max(flops[1:3]) and min(flops[1:3]) > flops[3]


def test_cache_select():
    module, (x, queries, ids, keep, seen) = make(lm_head=True).double(), data(dtype=torch.float64)
    first = module(queries, x, image_mask=seen, use_cache=True)
    then = module(input_ids=ids[:, :3], attention_mask=keep[:, :3], cache=first.cache, use_cache=True)
    rows = torch.tensor([2, 2, 0])
    cache = then.cache.select(rows)
    got = module(input_ids=ids[rows][:, 3:], attention_mask=keep[rows], cache=cache).text
    usual = module(input_ids=ids[:, 3:], attention_mask=keep, cache=then.cache).text
    close64(got, usual[rows])


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_masked_image_gives_the_mean_of_its_values(backend, device):
    module, (x, queries, *_, seen) = make(layers=1, text=False).to(device), data(device)
    seen[1] = 0
    with use_backend(backend):
        got = module(queries, x, image_mask=seen).queries
    assert got.isfinite().all()
    p = {n: t.detach().double() for n, t in module.named_parameters()}
    inputs = queries.double(), x.double()
    uniform = penalty(seen, None, torch.float32).double()
    # the lowest float32 takes the scores' digits with it: all keys weigh alike
    uniform[1] = 0
    q = norm(p, "layernorm", inputs[0].expand(B, -1, -1))
    q = attend(p, "encoder.layer.0.attention", q, q, 0.0)
    own = {n: t.clone() for n, t in p.items()}
    for part in ("weight", "bias"):
        own[f"encoder.layer.0.crossattention.attention.query.{part}"].zero_()
    exact = feed(p, "encoder.layer.0", "_query", attend(own, "encoder.layer.0.crossattention", q, inputs[1], uniform))[
        1
    ]
    with use_backend("reference"):
        usual = module(queries, x, image_mask=seen).queries[1]
    error = beside("masked", got[1], usual, exact)
    # no slack from the usual computation: it is the same here
    assert error.error <= 64 * ulp(error.scale, torch.float32), error


@pytest.mark.parametrize("masked", [LAVIS, LOWEST])
def test_a_text_of_padding_only(masked):
    """LAVIS' -10000 shifts all scores alike, so that the mask has no effect; the lowest float makes all weigh alike."""
    module, (_, _, ids, keep, _) = make(masked=masked), data()
    keep[1] = 0
    got, free = (module(input_ids=ids, attention_mask=mask).text for mask in (keep, None))
    assert got.isfinite().all()
    # subtracting 10000 costs the scores the digits below its last place
    limit = 256 * ulp(10000.0, torch.float32)
    assert ((got[1] - free[1]).abs().max() <= limit) == (masked == LAVIS)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_mask_dtypes(mask_dtype):
    module, (x, queries, ids, keep, seen) = make(), data()
    base = module(queries, x, ids, keep, seen).hidden
    assert torch.equal(module(queries, x, ids, keep.to(mask_dtype), seen.to(mask_dtype)).hidden, base)


# -- beside transformers -------------------------------------------------------------------------------------------


def hf_models():
    from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

    sizes = {
        "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": H, "intermediate_size": 24,
        "encoder_hidden_size": C, "vocab_size": V, "max_position_embeddings": 12, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    blip2 = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    return blip2, InstructBlipQFormerModel(InstructBlipQFormerConfig(**sizes))


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_beside_transformers(name, dtype, backend, device):
    pytest.importorskip("transformers")
    theirs = randomised(hf_models()[name == "instructblip"])
    text = name == "instructblip"
    theirs, module = theirs.to(device, dtype), make(text=text).to(device, dtype)
    upstream = {f"qformer.{n}": t for n, t in theirs.state_dict().items()}
    state = to_ours(f"qformer.hf_{name}", upstream)
    assert module.load_state_dict({n.removeprefix("qformer."): t for n, t in state.items()}).missing_keys == []
    inputs = data(device, dtype)

    def run(call, model, cast):
        x, queries, ids, keep, seen = (t.to(cast) if t.is_floating_point() else t for t in inputs)
        x, queries = x.detach().requires_grad_(), queries.detach().requires_grad_()
        y = call(model, x, queries, ids, torch.cat((keep.new_ones(B, M), keep), 1), seen)
        found = gradients(y, dict(model.named_parameters()) | {"x": x, "queries": queries})
        named = {f"qformer.{n}": t for n, t in found.items() if n in dict(model.named_parameters())}
        named = to_ours(f"qformer.hf_{name}", named) if model is not module else named
        return {n: found[n] for n in ("y", "x", "queries")} | {n.removeprefix("qformer."): t for n, t in named.items()}

    def hf(model, x, queries, ids, keep, seen):
        words = {"input_ids": ids, "attention_mask": keep} if text else {}
        queries = queries.expand(B, -1, -1)
        return model(query_embeds=queries, encoder_hidden_states=x, encoder_attention_mask=seen, **words)[0]

    def own(model, x, queries, ids, keep, seen):
        return model(queries, x, *((ids, keep) if text else ()), image_mask=seen).hidden

    with use_backend(backend):
        got = run(own, module, dtype)
    draws, wide = [], copy.deepcopy(theirs).double()
    for draw in SEEDS:
        inputs = data(device, dtype) if draw else inputs
        draws.append((run(hf, theirs, dtype), run(hf, wide, torch.float64)))
    assert_model(got, draws)


def test_transformers_checkpoints_load_strictly_and_go_back():
    pytest.importorskip("transformers")
    for name, theirs in zip(("hf_blip2", "hf_instructblip"), hf_models(), strict=True):
        upstream = {f"qformer.{n}": t for n, t in theirs.state_dict().items()}
        module = nn.ModuleDict({"qformer": make(text="instruct" in name)})
        module.load_state_dict(to_ours(f"qformer.{name}", upstream))
        back = to_upstream(f"qformer.{name}", module.state_dict())
        assert set(back) == set(upstream) and all(torch.equal(back[n], t) for n, t in upstream.items())


def test_lavis_checkpoint_is_tied_and_drops_position_ids():
    module = nn.ModuleDict({"qformer": make(lm_head=True)})
    upstream = to_upstream("qformer.lavis_itg", module.state_dict())
    assert {"Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias",
            "Qformer.cls.predictions.bias", "Qformer.bert.encoder.layer.2.crossattention.self.key.weight",
            "Qformer.bert.embeddings.LayerNorm.bias"} <= set(upstream)  # fmt: skip
    assert (
        upstream["Qformer.cls.predictions.decoder.weight"] is upstream["Qformer.bert.embeddings.word_embeddings.weight"]
    )
    upstream["Qformer.bert.embeddings.position_ids"] = torch.arange(12)[None]
    ours = to_ours("qformer.lavis_itg", upstream)
    twin = nn.ModuleDict({"qformer": make(lm_head=True)})
    twin.load_state_dict(ours)
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in module.state_dict().items())
    upstream["Qformer.cls.predictions.decoder.weight"] = torch.zeros(V, D)
    with pytest.raises(ValueError, match="values differ"):
        to_ours("qformer.lavis_itg", upstream)
    with pytest.raises(ValueError, match="unknown upstream key 'Qformer.bert.pooler'"):
        to_ours("qformer.lavis_itg", {"Qformer.bert.pooler": torch.zeros(1)})


def test_inits_and_published_size():
    published = QFormer(device="meta")
    # with 32 queries and a projection to 2560, as BLIP-2 counts
    assert sum(p.numel() for p in published.parameters()) + 32 * 768 + 769 * 2560 == 107_130_880
    module = QFormer(D, 2, H, 400, vocab_size=V, lm_head=True)
    assert not module.embeddings.word_embeddings.weight[0].any()
    weight = module.encoder.layer[0].intermediate.dense.weight
    assert 0.015 < weight.std() < 0.025 and not module.encoder.layer[0].attention.output.dense.bias.any()
    module.copy_text_to_queries()
    layer = module.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert layer.intermediate_query.dense.weight is not layer.intermediate.dense.weight
