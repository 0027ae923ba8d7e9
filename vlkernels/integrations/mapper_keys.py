"""Upstream's parameter names of position resamplers, mapping networks and abstractors, and ours."""

from __future__ import annotations

from ._rows import Rows, renamed


def _below(rows: Rows, upstream: str, ours: str = "") -> Rows:
    return tuple((upstream + their, ours + our) for their, our in rows)


_NORMS = ("ln_q", "ln_kv")
_ATTN_POOL: Rows = (
    *((name, name) for name in ("query", "pos_embed", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias")),
    *renamed(**{name: name for name in _NORMS}),
    *_below(renamed(out_proj="out_proj"), "attn.", "attn."),
)
_POST: Rows = (*renamed(ln_post="ln_post"), ("proj", "proj"))

# timm's ViT block
_VIT_BLOCK = renamed(norm1="norm1", norm2="norm2", qkv="attn.qkv", proj="attn.proj", fc1="mlp.fc1", fc2="mlp.fc2")
_CLIPCAP_LAYER: Rows = (
    *renamed(norm1="norm1", norm2="norm2", proj="attn.project", fc1="mlp.fc1", fc2="mlp.fc2"),
    ("attn.to_queries.weight", "to_queries.weight"),
    ("attn.to_keys_values.weight", "to_keys_values.weight"),
)
# nn.TransformerEncoderLayer
_ENCODER_LAYER: Rows = (
    *renamed(norm1="norm1", norm2="norm2", proj="self_attn.out_proj", fc1="linear1", fc2="linear2"),
    ("self_attn.in_proj_weight", "qkv.weight"),
    ("self_attn.in_proj_bias", "qkv.bias"),
)

_ATTENTION, _OUTPUT = "crossattention.attention.", "crossattention.output."
_OWL_LAYER: Rows = (
    *renamed(norm1="crossattention.norm1", normk="crossattention.normk"),
    *_below(renamed(query="query", key="key", value="value"), _ATTENTION),
    *_below(renamed(out_proj="out_proj", norm2="norm2"), _OUTPUT),
    *_below(renamed(w1="w1", w2="w2", w3="w3", ffn_ln="ffn_ln"), f"{_OUTPUT}mlp."),
)
_POSITIONS: Rows = tuple((f"{_ATTENTION}{name}", name) for name in ("q_pos_embed", "k_pos_embed"))


def _owl(queries: str, fc: str, below: str = "", positions: Rows = ()) -> Rows:
    inside = (
        *_below((*_OWL_LAYER, *positions), "encoder.layers.{l}.", "layers.{l}."),
        *renamed(visual_fc=fc),
        ("vit_eos", "vit_eos"),
    )
    return ((queries, "query_tokens"), *_below(inside, below))


_DECODER_LINEARS = ("{part}", "self_attn.{part}", "encoder_attn.{part}")
_D_ABSTRACTOR: Rows = (
    *((n, n) for n in ("reference_points", "v_pos_emb", "eos_tokens", "query_position_embeddings.weight")),
    *renamed(**{n: n for n in ("input_proj.{i}", "output_proj")}),
    *_below(renamed(**{n: n for n in _DECODER_LINEARS}), "layers.{l}.", "layers.{l}."),
)

MAPPER_MAPS: dict[str, Rows] = {
    "resampler.qwen_vl": (*_below(_ATTN_POOL, "attn_pool."), *_POST),  # below transformer.visual.
    "resampler.omnilmm": (*_ATTN_POOL, *_POST),
    "resampler.minicpmv26": (*_ATTN_POOL, *_POST),  # below resampler.
    "resampler.llama_adapter_v2": (
        *renamed(**{n: n for n in ("clip_proj", "clip_proj_norm", "visual_proj", "visual_proj_norm")}),
        ("visual_query.weight", "visual_query.weight"),
        *_below(_VIT_BLOCK, "visual_blocks.{l}.", "visual_blocks.{l}."),
    ),
    "mapper.clipcap_mlp": _below(renamed(**{"model.{i}": "model.{i}"}), "clip_project."),
    "mapper.esper_mlp": _below(renamed(**{"model.{i}": "model.{i}"}), "clip_project."),
    "mapper.clipcap_transformer": _below(
        (
            *renamed(linear="linear"),
            ("prefix_const", "prefix_const"),
            *_below(_CLIPCAP_LAYER, "transformer.layers.{l}.", "layers.{l}."),
        ),
        "clip_project.",
    ),
    "mapper.mapl": (
        ("const", "const"),
        *renamed(down="down", up="up"),
        *_below(_ENCODER_LAYER, "transformer.layers.{l}.", "layers.{l}."),
    ),
    "mapper.meta_mapper": (("mapper_net.vars.{i}", "vars.{i}"),),
    "abstractor.mplug_owl1": _owl("query_tokens", "visual_fc", below="abstractor."),
    "abstractor.mplug_owl2": _owl("query_embeds", "visual_fc", positions=_POSITIONS),  # below model.visual_abstractor.
    "abstractor.honeybee_resampler": (  # below abstractor.
        *_owl("query_tokens", "visual_output_fc"),
        *renamed(visual_input_fc="visual_input_fc"),
        ("pos_emb", "pos_emb"),
    ),
    "abstractor.honeybee_d": _D_ABSTRACTOR,  # below abstractor.; ours are upstream's
    "op.ms_deform_attn": (),
}
