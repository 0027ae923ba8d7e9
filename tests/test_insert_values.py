"""What inserted modules compute in a model, against peft, this library's own layers, and the equations by hand."""

import pytest
import torch
import torch.nn.functional as F
from insert_models import ANSWER, IDS, Seen, close, integrator, logits, model, set_batch, stir

import vlkernels
from vlkernels.modules import CogVLMDecoderLayer, MPLUGOwl2DecoderLayer, cogvlm_position_ids

pytestmark = pytest.mark.usefixtures("on_the_reference")


@torch.no_grad()
def test_adaption_prompt_is_pefts():
    """The scalar gate on a Llama, against peft's own adaption prompt with the same parameters."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        model("llama"), peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    )
    ours = model("llama")
    vlkernels.insert(ours, integrator("adaption_prompt"))
    stir(ours)
    for i in (1, 2):
        mine = ours.model.layers[i].self_attn.vlkernels_prefix
        other = theirs.base_model.model.model.layers[i].self_attn
        other.adaption_prompt.data.copy_(mine.prompt)
        other.adaption_gate.data.copy_(mine.gate)
    assert close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("kind", ["cogvlm", "mplug_owl2"])
@torch.no_grad()
def test_experts_are_the_layers_of_their_systems(kind):
    """A Llama layer with experts, against this library's decoder layer of that system with the same weights."""
    m = model("llama")
    vlkernels.insert(m, integrator(kind, vision_bias=False))
    stir(m)
    layer = m.model.layers[0]
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1]])
    m.vlkernels.set_modality(mask)
    a, p, eps = layer.self_attn, layer.mlp, m.config.rms_norm_eps
    if kind == "cogvlm":
        own = CogVLMDecoderLayer(32, 48, 4, 2, eps=eps)
        for which, q, f in (("language", a, p), ("vision", a.vlkernels_expert, p.vlkernels_expert)):
            packed = torch.cat([getattr(q, f"{n}_proj").weight for n in "qkv"])
            getattr(own.self_attn, f"{which}_expert_query_key_value").weight.copy_(packed)
            getattr(own.self_attn, f"{which}_expert_dense").weight.copy_(q.o_proj.weight)
            for n in ("gate_proj", "up_proj", "down_proj"):
                getattr(getattr(own.mlp, f"{which}_mlp"), n).weight.copy_(getattr(f, n).weight)
        own.input_layernorm.weight.copy_(layer.input_layernorm.weight)
        own.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
        positions = cogvlm_position_ids(mask)
    else:
        own = MPLUGOwl2DecoderLayer(32, 48, 4, 2, eps=eps)
        for n in ("k_proj", "v_proj"):
            for i, weights in enumerate((a, a.vlkernels_expert)):
                getattr(own.self_attn, n).multiway[i].weight.copy_(getattr(weights, n).weight)
        for n in ("input_layernorm", "post_attention_layernorm"):
            for i, weights in enumerate((layer, layer.vlkernels_expert)):
                getattr(own, n).multiway[i].weight.copy_(getattr(weights, n).weight)
        own.self_attn.q_proj.weight.copy_(a.q_proj.weight)
        own.self_attn.o_proj.weight.copy_(a.o_proj.weight)
        for n in ("gate_proj", "up_proj", "down_proj"):
            getattr(own.mlp, n).weight.copy_(getattr(p, n).weight)
        positions = torch.arange(7).expand(2, -1)
    seen = Seen(m, ["model.layers.0"])
    m(IDS, position_ids=positions)
    assert close(seen.outputs["model.layers.0"], own(seen.inputs["model.layers.0"], mask, position_ids=positions))


@torch.no_grad()
def test_text_rows_beside_an_image_are_the_base():
    """A sample without image tokens is the base model's, bit for bit, in a batch with one."""
    m = model("llama")
    base = m(IDS).logits
    for kind in ("cogvlm", "mplug_owl2"):
        vlkernels.insert(m, integrator(kind))
        stir(m)
        set_batch(m, kind, "llama")
        found = m(IDS).logits
        assert torch.equal(found[1], base[1]) and not torch.equal(found[0], base[0])
        vlkernels.remove(m)


@torch.no_grad()
def test_gated_block_stands_before_the_layer():
    """Every second layer of three: the one in the middle. Its input is the block's output over the layer's."""
    m = model("llama")
    vlkernels.insert(m, integrator("flamingo"))
    stir(m)
    set_batch(m, "flamingo", "llama")
    seen = Seen(m, ["model.layers.0", "model.layers.1.input_layernorm", "model.layers.1"])
    m(IDS)
    block, batch = m.model.layers[1].vlkernels_gated, m.vlkernels.of("gated")
    locations = torch.diff(batch["time"], prepend=torch.zeros(2, 1, dtype=torch.int32)) > 0
    want = block(seen.outputs["model.layers.0"], batch["media"], locations)
    assert close(seen.inputs["model.layers.1.input_layernorm"], want)
    assert not hasattr(m.model.layers[0], "vlkernels_gated") and not hasattr(m.model.layers[2], "vlkernels_gated")


@pytest.mark.parametrize("system, words", [("flamingo", {}), ("idefics", {}), ("idefics", {"immediate": False})])
@torch.no_grad()
def test_text_alone_is_a_text_before_its_media(system, words):
    """set_media(None) gives what rows before any medium get."""
    m = model("llama")
    vlkernels.insert(m, integrator(system, **words))
    stir(m)
    m.vlkernels.set_media(torch.randn(2, 1, 3, 20), torch.zeros(2, 7, dtype=torch.bool))
    unseen = m(IDS).logits
    m.vlkernels.set_media(None)
    assert close(m(IDS).logits, unseen)


PREFIXED = {
    "opt": ("model.decoder.layers.1.self_attn", "q_proj", "k_proj", "v_proj", "out_proj", 8, None),
    "opt_post_norm": ("model.decoder.layers.1.self_attn", "q_proj", "k_proj", "v_proj", "out_proj", 8, None),
    "gpt2": ("transformer.h.1.attn", "c_attn", "", "", "c_proj", 8, None),
    "gptj": ("transformer.h.1.attn", "q_proj", "k_proj", "v_proj", "out_proj", 8, 1),
    "llama": ("model.layers.1.self_attn", "q_proj", "k_proj", "v_proj", "o_proj", 8, 1),
    "t5": ("decoder.block.1.layer.0.SelfAttention", "q", "k", "v", "o", 6, None),
    "bart": ("model.decoder.layers.1.self_attn", "q_proj", "k_proj", "v_proj", "out_proj", 8, None),
}


@pytest.mark.parametrize("family", PREFIXED)
@torch.no_grad()
def test_prefix_by_hand(family):
    """out's input grows by tanh(gate) softmax(scale q K_Pᵀ) V_P; of rotated queries position 0, which is not turned."""
    path, q, k, v, out, width, rows = PREFIXED[family]
    m = model(family, "eager")
    seen = Seen(m, [f"{path}.{n}" for n in (q, out)])
    logits(m, family)
    before, queries = seen.inputs[f"{path}.{out}"], seen.outputs[f"{path}.{q}"]
    vlkernels.insert(m, vlkernels.AdaptivePrefix(rows=3, visual=True, new_gate=True), layers=1)
    stir(m)
    visual = torch.randn(2, 3, 32)
    m.vlkernels.set_media(visual)
    logits(m, family)
    attention = m.get_submodule(path)
    part = attention.vlkernels_prefix
    prompt = part.prompt + visual
    if family == "gpt2":
        queries = queries.chunk(3, -1)[0]
        keys, values = attention.c_attn(prompt).chunk(3, -1)[1:]
    else:
        keys, values = getattr(attention, k)(prompt), getattr(attention, v)(prompt)
    heads = lambda t: t.unflatten(-1, (-1, width)).transpose(1, 2)  # noqa: E731
    queries, keys, values = heads(queries), heads(keys), heads(values)
    keys, values = (t.repeat_interleave(queries.shape[1] // t.shape[1], 1) for t in (keys, values))
    weights = (queries @ keys.transpose(2, 3) * (1.0 if family == "t5" else width**-0.5)).softmax(-1)
    added = (part.gate.tanh() * part.new_gate * (weights @ values)).transpose(1, 2).flatten(2)
    found = seen.inputs[f"{path}.{out}"]
    assert close(found[:, :rows], (before + added)[:, :rows])
    assert not close(found[:, -1], before[:, -1])


@torch.no_grad()
def test_prefix_on_rotated_queries():
    """All positions of a Llama and a GPT-J: queries of the model's own rotation."""
    for family, path in (("llama", "model.layers.2.self_attn"), ("gptj", "transformer.h.2.attn")):
        m = model(family, "eager")
        out = f"{path}.{'o_proj' if family == 'llama' else 'out_proj'}"
        kept = []
        attention = m.get_submodule(path)
        # the queries as the scores get them
        if family == "llama":
            from transformers.models.llama import modeling_llama as room

            turn = room.apply_rotary_pos_emb
            seen = Seen(m, [out, f"{path}.q_proj"])
            logits(m, family)
            q = seen.outputs[f"{path}.q_proj"].unflatten(-1, (-1, 8)).transpose(1, 2)
            cos, sin = m.model.rotary_emb(q, torch.arange(7)[None])
            q = turn(q, q, cos, sin)[0]
        else:
            inner = attention._attn
            attention._attn = lambda query, *a, inner=inner, kept=kept: (kept.append(query), inner(query, *a))[1]
            seen = Seen(m, [out])
            logits(m, family)
            q = kept[0]
            del attention._attn
        before = seen.inputs[out]
        vlkernels.insert(m, vlkernels.AdaptivePrefix(rows=3), layers=2)
        stir(m)
        logits(m, family)
        part = attention.vlkernels_prefix
        keys, values = (
            linear(part.prompt).unflatten(-1, (-1, 8)).transpose(1, 2)
            for linear in (attention.k_proj, attention.v_proj)
        )
        keys, values = (t.repeat_interleave(4 // t.shape[1], 1) for t in (keys, values))
        added = part.gate.tanh() * ((q @ keys.transpose(2, 3) * 8**-0.5).softmax(-1) @ values)
        assert close(seen.inputs[out], before + added.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("family, ffn, out", [
    ("llama", "model.layers.1.mlp", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.mlp", "transformer.h.1.mlp"),
    ("gptj", "transformer.h.1.mlp", "transformer.h.1.mlp"),
    ("opt", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
    ("bart", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
    ("t5", "decoder.block.1.layer.2.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"),
])  # fmt: skip
@torch.no_grad()
def test_memory_by_hand(family, ffn, out):
    """The layer's output moves by s silu(z K_xᵀ) V_x, z what the feed-forward is given."""
    layer = ffn.rpartition(".")[0].removesuffix(".layer.2")
    m = model(family)
    seen = Seen(m, [ffn, out, layer] + (["model.decoder.layers.1.final_layer_norm"] if family == "bart" else []))
    logits(m, family)
    before = seen.inputs["model.decoder.layers.1.final_layer_norm"] if family == "bart" else seen.outputs[layer]
    vlkernels.insert(m, integrator("memvp", s=3.0), layers=1)
    stir(m)
    set_batch(m, "memvp", family)
    logits(m, family)
    handle = m.vlkernels
    batch = handle.integrators["memory"].made(handle, handle.of("memory"))
    z = seen.inputs[ffn].view(2, -1, 32)
    added = 3.0 * F.silu(z @ batch["keys"].mT) @ batch["values"]
    found = seen.inputs["model.decoder.layers.1.final_layer_norm"] if family == "bart" else seen.outputs[layer]
    assert close(found, before + added) and float(added.abs().max()) > 0.3 * float(before.abs().max())


@pytest.mark.parametrize("family", ["opt", "bart"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("end", [2, 3])
@torch.no_grad()
def test_epalm_by_hand(family, attention, end):
    """Layer 1 gets [token | text] under a mask open in its first row and column; before end=3 a new token stands there.
    Layers behind the last have that mask, too."""
    m = model(family, attention)
    path = "model.decoder.layers"
    vlkernels.insert(m, integrator("epalm", end=end, tokens=end - 1))
    stir(m)
    set_batch(m, "epalm", family)
    handle = m.vlkernels
    tokens = list(handle.integrators["epalm"].made(handle, handle.of("epalm")).tensors.values())
    seen = Seen(m, [f"{path}.{i}" for i in range(3)])
    found = logits(m, family)
    length = (ANSWER if family == "bart" else IDS).shape[1]
    assert found.shape[1] == length + 1
    vlkernels.remove(m)
    x, passed = seen.outputs[f"{path}.0"], seen.outputs[f"{path}.1"]
    mask = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
    mask[0] = True
    mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
    words = {"attention_mask": mask}
    if family == "bart":
        words["encoder_hidden_states"] = m.model.encoder(IDS).last_hidden_state
    x = torch.cat((tokens[0], x), 1)
    x = m.get_submodule(f"{path}.1")(x, **words)
    assert close(passed, x)
    x = torch.cat((tokens[1], x[:, 1:]), 1) if end == 3 else x
    x = m.get_submodule(f"{path}.2")(x, **words)
    norm = getattr(m.model.decoder, "final_layer_norm", None)
    assert close(found, m.lm_head(x if norm is None else norm(x)) + getattr(m, "final_logits_bias", 0))
