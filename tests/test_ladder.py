"""Ladders: the equation, first weights, T5 and Llama with cache, checkpointing, half precision, save and load."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from vlkernels.integrations.ladder import (
    add_ladder,
    ladder_of,
    ladder_state_dict,
    load_ladder,
    remove_ladder,
    save_ladder,
)
from vlkernels.modules import LadderConfig, fisher_importance, ladder_mix, set_gates
from vlkernels.modules.ladder import rungs
from vlkernels.modules.ladder_init import prune_llama, prune_t5
from vlkernels.modules.lora_blocks import rotary, rotated
from vlkernels.testing import meter

IDS = torch.tensor([[3, 5, 7, 2, 9], [4, 4, 9, 0, 0]])
MASK = (IDS != 0).long()
LEFT, LEFT_MASK = IDS.flip(1), MASK.flip(1)


def t5(layers=2, dropout=0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=layers,
            relative_attention_num_buckets=8, decoder_start_token_id=0, dropout_rate=dropout, **options,
        )
    ).eval()  # fmt: skip


def llama(layers=3, **options) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, **options,
        )
    ).eval()  # fmt: skip


def stirred(model: nn.Module) -> nn.Module:
    """Every trained number moved, so that no part is at its first value."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=g).to(p)
    return model


def image(kind: str, dtype=torch.float32) -> dict:
    """What the side network alone sees."""
    g = torch.Generator().manual_seed(2)
    seen = {"vis_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    if kind == "t5":
        feats, boxes = torch.randn(2, 3, 6, generator=g), torch.rand(2, 3, 4, generator=g)
        return seen | {"vis_feats": feats.to(dtype), "boxes": boxes.to(dtype)}
    return seen | {"vis_embeds": torch.randn(2, 3, 32, generator=g).to(dtype)}


def words(kind: str) -> dict:
    if kind == "t5":
        return {"input_ids": IDS, "attention_mask": MASK}
    return {"input_ids": LEFT, "attention_mask": LEFT_MASK}


def built(kind: str, **options) -> nn.Module:
    if kind == "t5":
        return stirred(add_ladder(t5(), 2, visual={"feat_dim": 6}, **options))
    return stirred(add_ladder(llama(), 2, **options))


def step(model: nn.Module, kind: str, **more):
    """Forward and backward of a loss: gradients by name."""
    model.zero_grad()
    out = model(**words(kind), labels=IDS if kind == "t5" else LEFT, **more)
    out.loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# -- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_mix(learned):
    s, h, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4), (2, 3, 4), (1,)))
    g = g.sigmoid().requires_grad_(learned)
    got = ladder_mix(s, h, g)
    want = g * s + (1 - g) * h
    assert (got - want).abs().max() <= 2 * torch.finfo(torch.float64).eps * want.abs().max()
    assert torch.equal(ladder_mix(s, h, None), s + h)
    leaves = [t.requires_grad_() for t in (s, h)] + [g] * learned
    assert torch.autograd.gradcheck(ladder_mix, (s, h, g))
    assert len(leaves) == 2 + learned


def test_a_learned_gate_keeps_one_tensor():
    s, h = (torch.randn(2, 3, 4).requires_grad_() for _ in range(2))
    alpha = nn.Parameter(torch.zeros(1))
    kept = meter.saved_bytes(lambda: ladder_mix(s, h, torch.sigmoid(alpha)))
    assert kept <= s.numel() * 4 + 3 * 4  # s - h, the gate and what makes it
    fixed = torch.ones(1)
    assert meter.saved_bytes(lambda: ladder_mix(s, h, fixed)) <= 2 * 4


def test_llama_is_the_equation():
    """Backbone states from stock transformers; the side network by hand, layers 0 and 2, gate T = 0.5."""
    model = llama().double()
    states = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, y, i=i: states.__setitem__(i, y))
        for i, layer in enumerate(model.model.layers)
    ]
    model(**words("llama"))
    for hook in hooks:
        hook.remove()
    stirred(add_ladder(model, 2, decoder_layers=(0, 2), gate_T=0.5))
    positions = torch.arange(5).expand(2, -1)
    got = model(**words("llama"), position_ids=positions).logits
    p = dict(model.model.named_parameters())
    cos, sin = rotary(positions, 4)
    seen = torch.ones(5, 5).tril().bool() & (LEFT_MASK[:, None, None] != 0)
    # a row that sees nothing is padding and is not compared
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)

    def norm(x, w):
        return w * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def lin(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    s = lin(p["embed_tokens.weight"][LEFT], "side_first_downsample")
    for i in (0, 2):
        gate, name = torch.sigmoid(p[f"side_gate_params.{i}"] / 0.5), f"side_block.{i}."
        s = gate * s + (1 - gate) * lin(states[i], f"side_downsamples.{i}")
        x = norm(s, p[name + "input_layernorm.weight"])
        q, k, v = (lin(x, f"{name}self_attn.{n}_proj").unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
        k, v = (t.repeat_interleave(2, 1) for t in (rotated(k, cos, sin), v))
        weights = (rotated(q, cos, sin) @ k.transpose(2, 3) / 2 + bias).softmax(-1)
        s = s + lin((weights @ v).transpose(1, 2).flatten(2), name + "self_attn.o_proj")
        x = norm(s, p[name + "post_attention_layernorm.weight"])
        s = s + lin(F.silu(lin(x, name + "mlp.gate_proj")) * lin(x, name + "mlp.up_proj"), name + "mlp.down_proj")
    want = lin(norm(s, p["final_side_layer_norm.weight"]), "side_final_upsample") @ model.lm_head.weight.t()
    keep = LEFT_MASK.bool()
    # transformers takes the rotary angles in float32
    assert (got - want)[keep].abs().max() <= 1e-6 * want[keep].abs().max()


@pytest.mark.parametrize("switch", [{"pool": True}, {"bias": False}, {"reduction": 1}, {"gate": "none"}])
def test_the_rarer_switches(switch):
    model = stirred(add_ladder(t5(), **{"reduction": 2, "init": "random", **switch}))
    names = {n for n, _ in model.named_parameters() if "side" in n}
    assert ("encoder.side_downsamples.0.weight" in names) == ("pool" not in switch and "reduction" not in switch)
    assert ("encoder.side_first_downsample.bias" in names) == (not {"bias", "reduction"} & set(switch))
    assert ("side_final_upsample.weight" in names) == ("reduction" not in switch)
    assert ("decoder.side_gate_params.1" in names) == ("gate" not in switch)
    stack, s, h = model.encoder, *torch.randn(2, 2, 5, 16)
    s = s[..., : 16 // ladder_of(model).reduction]
    down = F.adaptive_avg_pool1d(h, 8) if "pool" in switch else stack.side_downsamples[1](h)
    want = ladder_mix(s, down, stack.side_gate(1))
    assert torch.equal(stack.climb(1, s, h, lambda s: 2 * s), 2 * want)
    assert step(model, "t5").keys() == names


def test_image_and_text_of_llama_are_one_sequence():
    """With gates of one the backbone is unheard, and the side network a Llama over [image; text]."""
    model = built("llama", gate="one").double()
    seen = image("llama", torch.float64)
    x = torch.cat((seen["vis_embeds"], model.get_input_embeddings()(IDS)), 1)
    keep = torch.cat((seen["vis_attention_mask"], MASK), 1)
    want = model(inputs_embeds=x, attention_mask=keep).logits[:, 3:]
    got = model(input_ids=IDS, attention_mask=MASK, **seen).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_schedule_sets_its_gates():
    model = add_ladder(t5(), 2, gate="schedule")
    s, h = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
    assert torch.equal(model.encoder.climb(0, s, h, lambda s: s), s)  # 1 at first: the backbone stays unheard
    set_gates(model, 0.0)
    assert torch.equal(model.encoder.climb(0, s, h, lambda s: s), model.encoder.side_downsamples[0](h))
    assert "decoder.side_gate_1" in model.state_dict()
    with pytest.raises(ValueError, match="no fixed gates"):
        set_gates(add_ladder(t5(), 2), 0.5)


def test_rows_of_the_image_get_no_rung():
    model = add_ladder(llama(), 2)
    stack, s, h = model.model, torch.randn(2, 7, 16), torch.randn(2, 4, 32)
    y = stack.climb(0, s, h, lambda s: s, before=2, after=1)
    gate = stack.side_gate(0)
    assert torch.equal(y[:, :2], torch.addcmul(torch.zeros(()), gate, s[:, :2])) and y.shape == s.shape
    assert torch.equal(y[:, 2:6], ladder_mix(s[:, 2:6], stack.side_downsamples[0](h), gate))


# -- models --------------------------------------------------------------------------------------------------------


@torch.no_grad()  # with gradients PyTorch's attention takes another way
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_backbone_stays_as_it_is(kind):
    make, pictures = (t5, {"visual": {"feat_dim": 6}}) if kind == "t5" else (llama, {})
    model = make()
    before = copy.deepcopy(model.state_dict())
    asked = {**words(kind), **({"decoder_input_ids": IDS} if kind == "t5" else {})}
    logits = model(**asked).logits
    assert add_ladder(model, 2, **pictures) is model
    after = model.state_dict()
    assert all(torch.equal(after[n], value) for n, value in before.items())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in after if n not in before} - {"encoder.visual_embedding.obj_order_embedding.weight"} == trained
    assert type(model).__name__ == type(make()).__name__ and isinstance(model, type(make()))
    # a fresh ladder is not its backbone
    assert not torch.equal(model(**asked).logits, logits)
    remove_ladder(model)
    assert list(model.state_dict()) == list(before) and torch.equal(model(**asked).logits, logits)
    assert type(model) is type(make()) and ladder_of(model) is None
    assert type(add_ladder(model, 2)).vlkernels_fused  # and again


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_no_gradient_and_no_saved_byte_of_the_backbone(kind):
    """Also in training, with dropout and checkpointing on, where transformers' T5 asks for gradients of a bias."""
    model = built(kind).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for n, m in model.named_modules() if n.split(".")[-2:-1] in (["block"], ["layers"])]
    assert len(layers) == (4 if kind == "t5" else 3)
    outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda m, a, y: outputs.append((y if torch.is_tensor(y) else y[0], a)))
    found = step(model, kind, **image(kind))
    assert outputs and not any(y.requires_grad for y, _ in outputs)
    assert all("side" in n or "visual_embedding" in n for n in found)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)


def test_training_keeps_no_cache():
    for kind in ("t5", "llama"):
        model = built(kind)
        asked = {**words(kind), "labels": IDS}
        assert model(**asked).past_key_values is not None
        assert model.train()(**asked).past_key_values is None


def test_gradients_of_inputs_embeds_go_through_the_backbone():
    """A frozen backbone is no reason to drop a part of a gradient: the one of a trained backbone, bit for bit."""
    model = stirred(add_ladder(llama(layers=2), 2))
    x = model.get_input_embeddings()(LEFT).detach().requires_grad_()
    cot = torch.randn(2, 5, 29, generator=torch.Generator().manual_seed(3))
    found = []
    for trained in (False, True):
        model.model.layers.requires_grad_(trained)
        found.append(torch.autograd.grad((model(inputs_embeds=x).logits * cot).sum(), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("seen", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_cache(kind, seen):
    """Word by word, with the keys and values of backbone and side network in one cache: the logits of one call."""
    model = built(kind, **({"decoder_layers": (1,)} if kind == "t5" else {"decoder_layers": (0, 2)})).double()
    more = image(kind, torch.float64) if seen else {}
    if kind == "t5":
        encoded = model.encoder(**words(kind), **more)
        asked = {"attention_mask": MASK, "encoder_outputs": encoded}
        asked |= {"vis_attention_mask": more["vis_attention_mask"]} if seen else {}
        whole, name = model(**asked, decoder_input_ids=IDS).logits, "decoder_input_ids"
    else:
        positions = (LEFT_MASK.cumsum(1) - 1).clamp(min=0)
        whole, name = model(**words(kind), **more, position_ids=positions).logits, "input_ids"
    past, rows = None, []
    for t in range(5):
        if kind == "t5":
            now = asked | {name: IDS[:, t : t + 1]}
        else:
            now = {name: LEFT[:, t : t + 1], "attention_mask": LEFT_MASK[:, : t + 1], **more}
            now["position_ids"] = positions[:, t : t + 1]
        found = model(**now, past_key_values=past, use_cache=True)
        past, rows = found.past_key_values, [*rows, found.logits]
    got, keep = torch.cat(rows, 1), (LEFT_MASK if kind == "llama" else torch.ones_like(IDS)).bool()
    assert (got - whole)[keep].abs().max() <= 1e-6 * whole[keep].abs().max()  # rotary angles are float32
    count = len((past.self_attention_cache if kind == "t5" else past).layers)
    assert count == (3 if kind == "t5" else 5)  # the layers, then the rungs


@pytest.mark.parametrize("seen", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_generate(kind, seen):
    model = built(kind)
    asked = words(kind) | (image(kind) if seen else {}) | {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        want = model.generate(**asked, num_beams=beams, use_cache=False)
        assert torch.equal(model.generate(**asked, num_beams=beams), want)
    if not (kind == "llama" and seen):
        want = model.generate(**asked)
        static = model.generate(**asked, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, want)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_checkpointing(kind):
    """The same gradients, and fewer bytes kept."""
    model = built(kind).double().train()
    more = image(kind, torch.float64)
    want = step(model, kind, **more)
    asked = {**words(kind), "labels": IDS, **more}
    kept = meter.saved_bytes(lambda: model(**asked).loss, model.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model, kind, **more)
    assert found.keys() == want.keys()
    top = max(g.abs().max() for g in want.values())
    for n, g in want.items():  # a state that several layers read is summed in another order
        assert (found[n] - g).abs().max() <= 1e-12 * top, n
    assert meter.saved_bytes(lambda: model(**asked).loss, model.parameters()) < 0.7 * kept


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_compile(kind):
    """One graph, forward and backward."""
    model = built(kind).train()
    asked = {**words(kind), "labels": IDS, **image(kind)}
    want = model(**asked).logits
    try:
        found = torch.compile(model, backend="eager", fullgraph=True)(**asked)
        found.loss.backward()
    finally:
        torch._dynamo.reset()
    assert torch.equal(found.logits, want)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_half_precision(kind):
    """bf16 weights, and float32 weights under autocast: no farther from float64 than bf16's steps explain."""
    exact = built(kind).double()
    want = exact(**words(kind), labels=IDS, **image(kind, torch.float64)).logits.detach()
    model = built(kind).bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    stock = (t5() if kind == "t5" else llama()).double()
    labels = {"labels": IDS} if kind == "t5" else {}
    truth = stock(**words(kind), **labels).logits.detach()
    base = (stock.bfloat16()(**words(kind), **labels).logits.detach() - truth).abs().max() / truth.abs().max()
    got = model(**words(kind), labels=IDS, **image(kind, torch.bfloat16))
    assert got.logits.dtype == torch.bfloat16
    # two networks, one after the other, where stock has one
    assert (got.logits.detach() - want).abs().max() / want.abs().max() <= 8 * base
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = built(kind)(**words(kind), labels=IDS, **image(kind))
    assert (mixed.logits.detach() - want).abs().max() / want.abs().max() <= 8 * base
    mixed.loss.backward()


def test_adding_to_a_half_precision_model():
    for make in (t5, llama):
        model = add_ladder(make().bfloat16(), 2)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.side_rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_stay_in_float32():
    """transformers keeps T5's wo in float32 when the rest is half."""
    model = t5().half()
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo.float()
    add_ladder(model, 2)
    wide = {n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    assert wide == {n for n, p in model.named_parameters() if p.requires_grad and ".wo." in n}
    step(model, "t5")


def test_hidden_states():
    found = built("llama")(**words("llama"), output_hidden_states=True)
    assert len(found.hidden_states) == 4 and found.hidden_states[0].shape == (2, 5, 32)
    encoded = built("t5").encoder(**words("t5"), **image("t5"), output_hidden_states=True)
    assert [h.shape[-1] for h in encoded.hidden_states] == [16] * 3
    assert [tuple(s.shape) for s in encoded["side_hidden_states"]] == [(2, 8, 8)] * 3
    assert torch.equal(encoded.hidden_states[-1], encoded.last_hidden_state)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_eager_and_sdpa_agree(kind):
    model = built(kind)
    asked = {**words(kind), "labels": IDS, **image(kind)}
    keep = torch.ones_like(IDS).bool() if kind == "t5" else LEFT_MASK.bool()
    sdpa = model(**asked).logits[keep]
    model.set_attn_implementation("eager")
    assert (model(**asked).logits[keep] - sdpa).abs().max() <= 2e-5 * sdpa.abs().max()  # as goldens' outputs
    for n, m in model.named_modules():  # transformers 5.17 does not reach T5's stacks, whose layers stay as they were
        if "side_block.1" in n and hasattr(m, "config"):
            backbone = model.get_submodule(n.replace("side_block", "block" if kind == "t5" else "layers"))
            assert m.config._attn_implementation == backbone.config._attn_implementation


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_save_and_load(kind, tmp_path):
    model = built(kind, gate="schedule")
    file = tmp_path / "ladder.safetensors"
    save_ladder(model, file)
    stored = load_file(file)
    assert all("side" in n or "visual_embedding" in n for n in stored)
    assert set(stored) == set(ladder_state_dict(model)) and not any("obj_order" in n for n in stored)
    asked = {**words(kind), "labels": IDS, **image(kind)}
    want = model(**asked).logits
    fresh = load_ladder(t5() if kind == "t5" else llama(), file)
    assert torch.equal(fresh(**asked).logits, want) and ladder_of(fresh) == ladder_of(model)
    assert torch.equal(load_ladder(built(kind, gate="schedule"), file)(**asked).logits, want)
    with pytest.raises(ValueError, match="accepted: the same"):
        load_ladder(built(kind), file)
    del stored["model.side_final_upsample.bias" if kind == "llama" else "side_final_upsample.bias"]
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(stored, file, metadata)
    with pytest.raises(ValueError, match="side_final_upsample.bias is None in the file"):
        load_ladder(fresh, file)
    save_file(stored, file)
    with pytest.raises(ValueError, match="a file of save_ladder"):
        load_ladder(fresh, file)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_copies_and_stock_reload(kind, tmp_path):
    model = built(kind)
    asked = {**words(kind), "labels": IDS, **image(kind)}
    want = model(**asked).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(other(**asked).logits, want)
    model.save_pretrained(tmp_path)
    stock = (T5ForConditionalGeneration if kind == "t5" else LlamaForCausalLM).from_pretrained(tmp_path)
    own = (t5() if kind == "t5" else llama()).state_dict()
    assert all(torch.equal(stock.state_dict()[n], value) for n, value in own.items())


def test_resized_words_stay_one_table():
    model = built("t5")
    model.resize_token_embeddings(31)
    assert model.encoder.visual_embedding.obj_order_embedding is model.shared
    assert model(**words("t5"), labels=IDS, **image("t5")).logits.shape[-1] == 31


# -- first weights -------------------------------------------------------------------------------------------------


def test_fisher():
    model = t5(dropout=0.1).train()
    model.shared.weight.requires_grad_(False)
    batches = [{"input_ids": IDS[i : i + 1], "labels": IDS[i : i + 1]} for i in range(2)]
    got = fisher_importance(model, iter(batches * 2), samples=2)
    assert model.training and not model.shared.weight.requires_grad and model.lm_head.weight.grad is None
    model.eval().requires_grad_(True)
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for n, p in model.named_parameters():
            want[n] += p.grad.square()
    assert got.keys() == want.keys() and all(torch.equal(got[n], value) for n, value in want.items())


def test_pruned_t5_follows_the_importance():
    """With importances that name the rows, every weight is the backbone's at the named rows and columns."""
    model = t5(layers=1)
    state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    importance = {n: torch.zeros_like(p) for n, p in state.items()}
    g = torch.Generator().manual_seed(4)
    want, columns = {}, torch.randperm(16, generator=g)[:8].sort().values
    importance["shared.weight"][:, columns] = 1.0
    for stack in ("encoder", "decoder"):
        blocks = [("SelfAttention", "qkv", "o"), ("EncDecAttention", "qkv", "o"), ("DenseReluDense", ("wi",), "wo")]
        for j, (kind, into, out) in enumerate(blocks[:: 2 if stack == "encoder" else 1]):
            stem = f"{stack}.block.0.layer.{j}."
            want[stem + "layer_norm.weight"] = state[stem + "layer_norm.weight"][columns]
            for names in (into, (out,)):
                first = state[f"{stem}{kind}.{names[0]}.weight"]
                rows = torch.randperm(len(first), generator=g)[: len(first) // 2].sort().values
                for n in names:
                    name = f"{stem}{kind}.{n}.weight"
                    if n == "k":  # strong alone: in the product it counts nothing
                        importance[name] += 9.0
                    importance[name][rows] = -1.0  # the sign is none of its business
                    want[name] = state[name][rows][:, columns]
                columns = rows
        want[f"{stack}.final_layer_norm.weight"] = state[f"{stack}.final_layer_norm.weight"][columns]
    got = prune_t5(state, 2, importance)
    assert got.keys() == want.keys() and all(torch.equal(got[n], value) for n, value in want.items())
    add_ladder(model, 2, importance=importance)
    found = model.state_dict()
    for n, value in want.items():
        theirs = n.replace(".block.", ".side_block.").replace("final_layer_norm", "final_side_layer_norm")
        assert torch.equal(found[theirs], value), n
    bias = "SelfAttention.relative_attention_bias.weight"
    assert torch.equal(found[f"decoder.side_block.0.layer.0.{bias}"], state[f"decoder.block.0.layer.0.{bias}"])


def test_q_and_k_of_llama_keep_frequencies():
    """Pairs 0, R, ... of a head turn as the pairs 0, 1, ... of a head of width / R."""
    model = llama(layers=1)
    state = {n: p.detach() for n, p in model.named_parameters()}
    got = prune_llama(state, 2, 4, 2)
    rows = (torch.arange(4)[:, None] * 8 + torch.tensor([0, 2, 4, 6])).flatten()
    name = "model.layers.0.self_attn.q_proj.weight"
    columns = state["model.embed_tokens.weight"].abs().sum(0).argsort(descending=True)[:16].sort().values
    assert torch.equal(got[name], state[name][rows][:, columns])
    add_ladder(model, 2)
    stack = model.model
    assert torch.equal(stack.side_rotary_emb.inv_freq, stack.rotary_emb.inv_freq[::2])
    assert torch.equal(stack.side_block[0].self_attn.q_proj.weight, got[name])
    # o reads what v writes: the columns of a head's group are the channels that v kept
    v, o = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "vo")
    kept = [next(i for i in range(16) if torch.equal(state[v][i, columns], row)) for row in got[v]]
    read = [8 * h + kept[4 * (h // 2) + j] % 8 for h in range(4) for j in range(4)]
    assert all(any(torch.equal(state[o][i][read], row) for i in range(32)) for row in got[o])


def hooked(model: nn.Module) -> nn.Module:
    model.model.forward = model.model.forward
    return model


# -- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: LadderConfig(reduction=0), "reduction is 0"),
        (lambda: LadderConfig(gate="tanh"), "gate is 'tanh'; accepted: 'learned'"),
        (lambda: LadderConfig(gate_T=0.0), "gate_T is 0.0"),
        (lambda: rungs("decoder_layers", (), 3), "accepted: ascending numbers of layers, each from 0 to 2"),
        (lambda: rungs("decoder_layers", (1, 0), 3), "decoder_layers is"),
        (lambda: add_ladder(t5(), 2, encoder_layers=[2]), "encoder_layers is"),
        (lambda: add_ladder(t5(), 9), "accepted: at most the backbone's d_kv, 8"),
        (lambda: add_ladder(t5(), 2, init="zeros"), "init is 'zeros'"),
        (lambda: add_ladder(t5(), 2, importance={}), "importance has nothing for 'shared.weight'"),
        (lambda: add_ladder(t5(), 2, upstream_text_quirks=True, visual={"feat_dim": 6}), "accepted: False"),
        (lambda: add_ladder(add_ladder(t5(), 2), 2), "has a ladder"),
        (lambda: add_ladder(llama(), 2, encoder_layers=(0,)), "are T5's"),
        (lambda: add_ladder(llama(), 8), "an even width"),
        (lambda: add_ladder(hooked(llama()), 2), "model carries a forward of its own"),
        (lambda: prune_t5({"shared.weight": torch.zeros(4, 4, dtype=torch.uint8)}, 2), "init='random'"),
        (lambda: remove_ladder(t5()), "has no ladder"),
        (lambda: ladder_state_dict(t5()), "has no ladder"),
        (lambda: add_ladder(t5(), 2)(**words("t5"), labels=IDS, **image("t5")), "without a visual embedding"),
        (lambda: built("t5")(**words("t5"), labels=IDS, output_attentions=True), "keeps no attentions"),
        (lambda: built("t5")(labels=IDS), "exactly one"),
        (lambda: built("llama")(), "exactly one"),
        (
            lambda: built("t5")(encoder_outputs=t5().encoder(input_ids=IDS), labels=IDS),
            "no last_side_hidden_state",
        ),
        (
            lambda: built("t5")(**words("t5"), labels=IDS, **image("t5") | {"vis_attention_mask": MASK}),
            r"vis_attention_mask has shape \(2, 5\)",
        ),
        (lambda: built("llama")(IDS, vis_embeds=torch.zeros(2, 3, 8)), "vis_embeds has shape"),
        (
            lambda: built("llama")(IDS, vis_embeds=torch.zeros(2, 3, 32), vis_attention_mask=MASK),
            r"vis_attention_mask has shape \(2, 5\)",
        ),
        (lambda: fisher_importance(t5(), []), "batches is empty"),
        (lambda: fisher_importance(t5(), [], samples=0), "samples is 0"),
        (lambda: fisher_importance(t5(), [{"input_ids": IDS, "decoder_input_ids": IDS}]), "gives no loss"),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_other_models():
    with pytest.raises(TypeError, match="accepted: transformers' T5ForConditionalGeneration, LlamaForCausalLM"):
        add_ladder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dynamic or static layers"):
        from transformers.cache_utils import DynamicSlidingWindowLayer

        cache = DynamicCache()
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
        built("llama")(IDS, past_key_values=cache)
