"""Key maps of ladders: ours have upstream's names."""

from __future__ import annotations

from ._rows import Rows, both, same

_T5: Rows = (
    *same("shared.weight", "lm_head.weight", "{stack}.embed_tokens.weight", "{stack}.{norm}.weight"),
    *same("{stack}.{blocks}.{i}.layer.{j}.{part}.{linear}.weight", "{stack}.{blocks}.{i}.layer.{j}.{norm}.weight"),
    *both("{stack}.side_first_downsample", "{stack}.side_downsamples.{i}", "side_final_upsample"),
    *same("{stack}.side_gate_params.{i}", "{stack}.side_gate_{i}"),
)
_VISUAL = "encoder.visual_embedding."

LADDER_MAPS: dict[str, Rows] = {
    "ladder.t5": _T5,
    "ladder.vlt5": (
        *_T5,
        *both(_VISUAL + "feat_embedding.{i}", _VISUAL + "absolute_vis_pos_embedding.{i}"),
        *same(_VISUAL + "img_order_embedding.weight", _VISUAL + "obj_order_embedding.weight"),
        *same(_VISUAL + "layer_norm.weight"),
    ),
}
