"""Key maps of ladders: ours have upstream's names."""

from __future__ import annotations

Rows = tuple[tuple[str, str], ...]


def _same(*names: str) -> Rows:
    return tuple((name, name) for name in names)


def _both(*names: str) -> Rows:
    """`weight` and `bias`."""
    return _same(*(f"{name}.{p}" for name in names for p in ("weight", "bias")))


_T5: Rows = (
    *_same("shared.weight", "lm_head.weight", "{stack}.embed_tokens.weight", "{stack}.{norm}.weight"),
    *_same("{stack}.{blocks}.{i}.layer.{j}.{part}.{linear}.weight", "{stack}.{blocks}.{i}.layer.{j}.{norm}.weight"),
    *_both("{stack}.side_first_downsample", "{stack}.side_downsamples.{i}", "side_final_upsample"),
    *_same("{stack}.side_gate_params.{i}", "{stack}.side_gate_{i}"),
)
_VISUAL = "encoder.visual_embedding."

LADDER_MAPS: dict[str, Rows] = {
    "ladder.t5": _T5,
    "ladder.vlt5": (
        *_T5,
        *_both(_VISUAL + "feat_embedding.{i}", _VISUAL + "absolute_vis_pos_embedding.{i}"),
        *_same(_VISUAL + "img_order_embedding.weight", _VISUAL + "obj_order_embedding.weight"),
        *_same(_VISUAL + "layer_norm.weight"),
    ),
}
