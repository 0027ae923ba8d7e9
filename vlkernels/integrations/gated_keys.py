"""Key maps of gated cross-attention layers: ours have upstream's names."""

from __future__ import annotations

from ._rows import same

# below lang_encoder.<decoder list>.<i>.gated_cross_attn_layer. in OpenFlamingo's checkpoints
_FLAMINGO = same("attn.{part}.weight", "attn.norm.bias", "attn_gate", "ff_gate", "ff.{i}.weight", "ff.{i}.bias")
_LAYER = same(
    "cross_attn.{part}.weight", "mlp.{part}.weight", "input_layernorm.weight", "post_attention_layernorm.weight"
)

GATED_MAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "gated.openflamingo": _FLAMINGO,
    "gated.lucidrains": _FLAMINGO,
    "gated.idefics": (*_LAYER, *same("alpha_cross_attn", "alpha_dense")),  # below model.gated_cross_attn_layers.<i>.
    # below model.language_model.layers.<i>.
    "gated.mllama": (*_LAYER, *same("cross_attn_attn_gate", "cross_attn_mlp_gate")),
}
