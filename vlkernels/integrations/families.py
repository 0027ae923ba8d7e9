"""Where the language models of the survey have their sub-layers: one declaration per kind of decoder or encoder layer.

A layer's own forward runs, with other callables in the places that are named here; see `hosts.py`. Nothing of
transformers is imported: layers are known by "module:Class".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Site:
    """One sub-layer: h = last(... first(z)), added to the residual r.

    host: path from the layer to the module whose forward calls the rest, "" for the layer itself. first gets z, last
    gives h (the first of a tuple). residual: the module whose input is r, or the number of r among the host's
    arguments. norm: the block's norm behind the residual add, None where norms come first.
    """

    kind: str  # attention, cross_attention or ffn
    first: str
    last: str
    residual: str | int
    norm: str | None = None
    host: str = ""


@dataclass(frozen=True)
class Attention:
    """A self-attention that a prefix can join: the names of its linears, and how its queries get their positions.

    query gives [q | k | v] where `packed`. rotary: "half", None, or "inside" where `_attn` gets rotated queries.
    scale: of the scores, 0 for head_dim^-0.5.
    """

    path: str
    query: str
    out: str
    heads: str
    head_dim: str = "head_dim"
    key: str = ""
    value: str = ""
    packed: bool = False
    rotary: str | None = None
    scale: float = 0.0


@dataclass(frozen=True)
class Family:
    """A kind of layer. width: path of the number of its channels. index: path of its number among the cache's layers.

    cache: the argument that holds the cache. feed_forward: path of a gated feed-forward with gate_proj, up_proj and
    down_proj. norms: of Llama-type layers. grows: positions are added to the embeddings and the model keeps
    the length that its layers return, so that a token may be put into the sequence between layers.
    """

    name: str
    layer: str
    stack: str
    width: str
    sites: tuple[Site, ...]
    attention: Attention | None = None
    index: str = ""
    cache: str = "past_key_values"
    feed_forward: str = ""
    norms: tuple[str, ...] = ()
    grows: bool = False

    def site(self, kind: str) -> Site | None:
        return next((s for s in self.sites if s.kind == kind), None)


_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_LLAMA = Family(
    "Llama", "llama.modeling_llama:LlamaDecoderLayer", "decoder", "hidden_size",
    (Site("attention", "self_attn", "self_attn", "input_layernorm"),
     Site("ffn", "mlp", "mlp", "post_attention_layernorm")),
    Attention("self_attn", out="o_proj", heads="config.num_attention_heads", rotary="half", **_QKV),
    index="self_attn.layer_idx", feed_forward="mlp", norms=("input_layernorm", "post_attention_layernorm"),
)  # fmt: skip
_OPT_ATTENTION = Attention("self_attn", out="out_proj", heads="num_heads", **_QKV)
_OPT = Family(
    "OPT", "opt.modeling_opt:OPTDecoderLayer", "decoder", "embed_dim",
    (Site("attention", "self_attn", "self_attn", "self_attn_layer_norm"),
     Site("ffn", "fc1", "fc2", "final_layer_norm")),
    _OPT_ATTENTION, index="self_attn.layer_idx", grows=True,
)  # fmt: skip
# OPT-350m, do_layer_norm_before=False
_OPT_POST = replace(_OPT, sites=(
    Site("attention", "self_attn", "self_attn", "self_attn", "self_attn_layer_norm"),
    Site("ffn", "fc1", "fc2", "fc1", "final_layer_norm")))  # fmt: skip
_GPT2 = Family(
    "GPT-2", "gpt2.modeling_gpt2:GPT2Block", "decoder", "attn.embed_dim",
    (Site("attention", "attn", "attn", "ln_1"), Site("ffn", "mlp", "mlp", "ln_2")),
    Attention("attn", query="c_attn", out="c_proj", heads="num_heads", packed=True),
    index="attn.layer_idx",
)  # fmt: skip
# attention and feed-forward beside each other behind one norm
_GPTJ = Family(
    "GPT-J", "gptj.modeling_gptj:GPTJBlock", "decoder", "attn.embed_dim",
    (Site("attention", "attn", "attn", "ln_1"), Site("ffn", "mlp", "mlp", "ln_1")),
    Attention("attn", out="out_proj", heads="num_attention_heads", rotary="inside", **_QKV),
    index="attn.layer_idx", cache="layer_past",
)  # fmt: skip
_T5_SELF = Attention("layer.0.SelfAttention", query="q", key="k", value="v", out="o", heads="n_heads",
                     head_dim="key_value_proj_dim", scale=1.0)  # fmt: skip
_T5_ENCODER = Family(
    "T5", "t5.modeling_t5:T5Block", "encoder", "layer.0.SelfAttention.d_model",
    (Site("attention", "SelfAttention", "SelfAttention", "layer_norm", host="layer.0"),
     Site("ffn", "DenseReluDense", "DenseReluDense", "layer_norm", host="layer.1")),
    _T5_SELF, index="layer.0.SelfAttention.layer_idx",
)  # fmt: skip
_T5_DECODER = replace(_T5_ENCODER, stack="decoder", sites=(
    Site("attention", "SelfAttention", "SelfAttention", "layer_norm", host="layer.0"),
    Site("cross_attention", "EncDecAttention", "EncDecAttention", "layer_norm", host="layer.1"),
    Site("ffn", "DenseReluDense", "DenseReluDense", "layer_norm", host="layer.2")))  # fmt: skip
_BART_ENCODER = Family(
    "BART", "bart.modeling_bart:BartEncoderLayer", "encoder", "embed_dim",
    (Site("attention", "self_attn", "self_attn", "self_attn", "self_attn_layer_norm"),
     Site("ffn", "fc1", "fc2", "fc1", "final_layer_norm")),
    _OPT_ATTENTION, index="self_attn.layer_idx",
)  # fmt: skip
_BART_DECODER = replace(
    _BART_ENCODER, layer="bart.modeling_bart:BartDecoderLayer", stack="decoder", grows=True, sites=(
        Site("attention", "self_attn", "self_attn", "self_attn", "self_attn_layer_norm"),
        Site("cross_attention", "encoder_attn", "encoder_attn", "encoder_attn", "encoder_attn_layer_norm"),
        Site("ffn", "fc1", "fc2", "fc1", "final_layer_norm")))  # fmt: skip
_DEBERTA = Family(
    "DeBERTa-v2", "deberta_v2.modeling_deberta_v2:DebertaV2Layer", "encoder", "attention.output.dense.out_features",
    (Site("attention", "dense", "dropout", 1, "LayerNorm", host="attention.output"),
     Site("ffn", "dense", "dropout", 1, "LayerNorm", host="output")),
)  # fmt: skip
_MAMBA = Family(
    "Mamba", "mamba.modeling_mamba:MambaBlock", "decoder", "mixer.hidden_size",
    (Site("attention", "mixer", "mixer", "norm"),), index="layer_idx", cache="cache_params",
)  # fmt: skip

FAMILIES = (_GPT2, _GPTJ, _OPT, _LLAMA, _T5_DECODER, _BART_ENCODER, _BART_DECODER, _DEBERTA, _MAMBA)
_BY_LAYER = {"transformers.models." + f.layer: f for f in FAMILIES}
NAMES = tuple(dict.fromkeys(f.name for f in FAMILIES))


def follow(module: nn.Module, path: str):
    """What stands at a dotted path, the module itself for ""."""
    for name in path.split(".") if path else ():
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def family_of(layer: nn.Module) -> Family | None:
    """The layer's declaration, of its own class or of the one that a sharded or adapted layer's class comes from."""
    known = next((c for c in type(layer).__mro__ if f"{c.__module__}:{c.__qualname__}" in _BY_LAYER), None)
    if known is None:
        return None
    family = _BY_LAYER[f"{known.__module__}:{known.__qualname__}"]
    if family is _OPT and not layer.do_layer_norm_before:
        return _OPT_POST
    if family is _T5_DECODER and not layer.is_decoder:
        return _T5_ENCODER
    return family


@dataclass(frozen=True)
class Stack:
    """The layers of one encoder or decoder, with their paths in the model."""

    family: Family
    path: str
    layers: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        return self.family.stack


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks of known layers in the model, in order; raises for a model without any, or with several models'."""
    found = list(_stacks(model))
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"{type(model).__name__}{f' (model_type {kind})' if kind else ''} has no layers of a known language model; "
            f"accepted: models of {', '.join(NAMES)}, alone or inside another model"
        )
    names = [s.name for s in found]
    if len(set(names)) < len(names) or len({s.family.name for s in found}) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several language models ({', '.join(s.path for s in found)}); "
            "accepted: one; pass the one that is meant"
        )
    return found


def _stacks(model: nn.Module) -> Iterator[Stack]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and (family := family_of(module[0])) is not None:
            yield Stack(family, path, tuple(module))
