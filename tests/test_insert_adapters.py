"""Adapters in a model: what the block adds at each place of each family, and what is special to one kind of them."""

import pytest
import torch
from insert_models import FAMILIES, IDS, Seen, close, integrator, logits, model, stir, words_of

import vlkernels

pytestmark = pytest.mark.usefixtures("on_the_reference")

# of layer 1: where h comes from, what r is the input of, where h + r goes, the block's norm
CROSS, OUTPUT = "encoder_attn_layer_norm", "attention.output.LayerNorm"
SITES = {
    ("llama", "attention"): ("self_attn", "input_layernorm", "<post_attention_layernorm", None),
    ("llama", "ffn"): ("mlp", "post_attention_layernorm", ">", None),
    ("opt", "attention"): ("self_attn", "self_attn_layer_norm", "<final_layer_norm", None),
    ("opt", "ffn"): ("fc2", "final_layer_norm", ">", None),
    ("opt_post_norm", "attention"): ("self_attn", "self_attn", "<self_attn_layer_norm", "self_attn_layer_norm"),
    ("opt_post_norm", "ffn"): ("fc2", "fc1", "<final_layer_norm", "final_layer_norm"),
    ("gpt2", "attention"): ("attn", "ln_1", "<ln_2", None),
    ("gpt2", "ffn"): ("mlp", "ln_2", ">", None),
    ("t5", "attention"): ("layer.0.SelfAttention", "layer.0.layer_norm", ">layer.0", None),
    ("t5", "cross_attention"): ("layer.1.EncDecAttention", "layer.1.layer_norm", ">layer.1", None),
    ("t5", "ffn"): ("layer.2.DenseReluDense", "layer.2.layer_norm", ">layer.2", None),
    ("bart", "attention"): ("self_attn", "self_attn", "<self_attn_layer_norm", "self_attn_layer_norm"),
    ("bart", "cross_attention"): ("encoder_attn", "encoder_attn", f"<{CROSS}", CROSS),
    ("bart", "ffn"): ("fc2", "fc1", "<final_layer_norm", "final_layer_norm"),
    ("deberta", "attention"): ("attention.output.dense", "", f"<{OUTPUT}", OUTPUT),
    ("deberta", "ffn"): ("output.dense", "intermediate", "<output.LayerNorm", "output.LayerNorm"),
    ("mamba", "attention"): ("mixer", "norm", ">", None),
    ("gptj", "attention"): ("attn", "ln_1", ">", None),
    ("gptj", "ffn"): ("mlp", "ln_1", ">", None),
}  # fmt: skip
_BLOCKS = dict(llama="model.layers", opt="model.decoder.layers", opt_post_norm="model.decoder.layers",
               gpt2="transformer.h", gptj="transformer.h", t5="decoder.block", bart="model.decoder.layers",
               deberta="deberta.encoder.layer", mamba="backbone.layers")  # fmt: skip


@pytest.mark.parametrize("family, place", SITES)
@torch.no_grad()
def test_adapters_stand_before_the_residual_add(family, place):
    """The block adds r to branch(h, r, norm): of Pfeiffer's, which reads all three, and of the parallel one."""
    h, r, total, norm = SITES[family, place]
    base = f"{_BLOCKS[family]}.1"
    name = lambda p: f"{base}.{p}".removesuffix(".")  # noqa: E731
    for kind, options in (("seq_bn", {"reduction_factor": 4}), ("par_bn", {"use_gating": True})):
        m = model(family)
        adapters = vlkernels.Adapters(kind=kind, options=options, at=(place,), stack="decoder")
        vlkernels.insert(m, adapters, layers=1)
        stir(m)
        seen = Seen(m, {name(p) for p in (h, r, total[1:])})
        logits(m, family)
        shape = seen.outputs[base] if base in seen.outputs else logits(m, family)
        text = lambda t, like=shape: t.view(*like.shape[:2], -1) if t.dim() == 2 else t  # noqa: E731
        part = next(x for n, x in m.named_modules() if n.endswith(f"vlkernels_adapters.{place}"))
        hidden, residual = text(seen.outputs[name(h)]), text(seen.inputs[name(r)])
        # before the norm is called once more
        got = text(seen.inputs[name(total[1:])] if total[0] == "<" else seen.outputs[name(total[1:])])
        want = residual + part.branch(hidden, residual, None if norm is None else m.get_submodule(name(norm)))
        if family == "gptj":
            # attention and feed-forward beside each other
            other = Seen(m, [name({"attention": "mlp", "ffn": "attn"}[place])])
            logits(m, family)
            want = want + next(iter(other.outputs.values()))
        assert close(got, want), kind


@torch.no_grad()
def test_hyperformer_knows_its_places():
    """One network for a stack makes the adapter of each layer and sub-layer from their embeddings."""
    m = model("bart")
    vlkernels.insert(m, integrator("hyperformer"))
    stir(m)
    path = "model.decoder.layers.1"
    seen = Seen(m, [f"{path}.{n}" for n in ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")])
    logits(m, "bart")
    network = m.model.decoder.vlkernels_adapters
    assert network is not m.model.encoder.vlkernels_adapters
    for h, r, norm, block in (("self_attn", "self_attn", "self_attn_layer_norm", "attn"),
                              ("fc2", "fc1", "final_layer_norm", "ff")):  # fmt: skip
        want = network.branch(seen.outputs[f"{path}.{h}"], layer=1, block=block) + seen.inputs[f"{path}.{r}"]
        assert close(seen.inputs[f"{path}.{norm}"], want)


@torch.no_grad()
def test_values_of_vl_pet():
    """In BART's decoder the values of the cross-attention, of the encoder's output; in its encoder both sub-layers."""
    m = model("bart")
    vlkernels.insert(m, integrator("vl_pet"))
    stir(m)
    path = "model.decoder.layers.1.encoder_attn"
    seen = Seen(m, [f"{path}.v_proj"])
    out = m(**words_of("bart"), use_cache=True)
    attention = m.get_submodule(path)
    x = seen.inputs[f"{path}.v_proj"]
    want = attention.vlkernels_adapters.attn_value_parallel_adapter.value(x, attention.v_proj(x))
    cached = out.past_key_values.cross_attention_cache.layers[1].values
    assert close(cached.transpose(1, 2).flatten(2), want)
    assert {n for n, _ in m.model.encoder.layers[0].vlkernels_adapters.named_children()} == {"attention", "ffn"}


@torch.no_grad()
def test_lavin_routes_by_the_prompt():
    """LaVIN's adapter stands before the attention; a later step takes the weights of the prompt's first token."""
    m = model("llama")
    vlkernels.insert(m, integrator("lavin"))
    stir(m)
    adapter = m.model.layers[1].vlkernels_adapters.attention
    seen = Seen(m, ["model.layers.1.input_layernorm", "model.layers.1.self_attn"])
    first = m(IDS, use_cache=True)
    n = seen.outputs["model.layers.1.input_layernorm"]
    weights = adapter.route(n)
    assert close(seen.inputs["model.layers.1.self_attn"], adapter(n, weights=weights))
    m(IDS[:, :1], past_key_values=first.past_key_values)
    n = seen.outputs["model.layers.1.input_layernorm"]
    assert close(seen.inputs["model.layers.1.self_attn"], adapter(n, weights=weights))
    assert not torch.equal(adapter.route(n), weights)


@torch.no_grad()
def test_tasks():
    m = model("t5")
    vlkernels.insert(m, vlkernels.Adapters(kind="vl_adapter", options={"tasks": ("a", "b")}))
    stir(m)
    found = {}
    for task in (None, "a", "b"):
        m.vlkernels.set_task(task)
        found[task] = logits(m, "t5")
    assert torch.equal(found[None], found["a"]) and not torch.equal(found["a"], found["b"])
    with pytest.raises(ValueError, match="task is 'c'; accepted: a, b"):
        m.vlkernels.set_task("c")
    assert torch.equal(logits(m, "t5"), found["b"])


def test_one_rule_for_all_compacters():
    m = model("t5")
    vlkernels.insert(m, vlkernels.Adapters(kind="compacter", options={"k": 2}, shared_rule=True))
    assert len({id(p) for n, p in m.named_parameters(remove_duplicate=False) if "phm_rule" in n}) == 1
    assert sum("phm_rule" in n for n in vlkernels.inserted_state_dict(m)) == 1


def test_norms_train_where_published():
    m = model("t5")
    vlkernels.insert(m, vlkernels.Adapters(kind="vl_adapter", train_norms=True), layers=[0, 1])
    trained = {n for n, p in m.named_parameters() if p.requires_grad and "vlkernels_" not in n}
    assert trained and all(n.endswith("layer_norm.weight") and (".0." in n or ".1." in n) for n in trained)
    assert trained <= vlkernels.inserted_state_dict(m).keys()


def test_every_family_has_its_sites():
    assert {f for f, _ in SITES} == set(FAMILIES)
