"""Goldens of gated cross-attention layers: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import GatedCrossAttentionBlock, IdeficsGatedCrossAttentionLayer, MllamaCrossAttentionDecoderLayer
from .golden_builders import Builder, Named, Run

_OPS = ("gated_residual", "linear_projector", "media_cross_attention", "mlp_projector", "multi_layer_kv")
_DATA = ("B", "T", "T_img", "T_loc", "n", "loc", "in_scale")


def _flamingo(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "dim_visual", "dim_head", "heads", "ff_mult", "immediate", "cached", *_DATA)
    words = {key: hp[key] for key in ("dim", "dim_visual", "dim_head", "heads", "ff_mult") if key in hp}
    if "immediate" in hp:
        words["only_attend_immediate_media"] = hp["immediate"]
    cached = hp.get("cached", False)

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        given = (inputs["x"], inputs["media"], inputs.get("media_locations"), cached)
        return {"attn": module.attn(*given), "y": module(*given)}

    return GatedCrossAttentionBlock(**words, strict=False), run


def _idefics(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "ff", "heads", "alpha_type", "qk_ln", "dim_visual", "n_img", "vis", *_DATA)

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        names = ("x", "image_hidden_states", "image_attention_mask", "cross_attention_gate")
        return {"y": module(*(inputs[n] for n in names))}

    return IdeficsGatedCrossAttentionLayer(
        hp["dim"], hp["ff"], hp["heads"], hp["dim_visual"], alpha_type=hp.get("alpha_type", "float"),
        qk_layer_norms=hp.get("qk_ln", False),
    ), run  # fmt: skip


def _mllama(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "ff", "heads", "kv_heads", "cross_attention_mask", *_DATA)

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        raw, states = inputs["cross_attention_mask_raw"], inputs["cross_attention_states"]
        # upstream's own two masks, which our layer does not make
        seen = raw.flatten(2) != 0
        rows = seen.any(-1, keepdim=True)
        dense = torch.zeros(seen.shape).masked_fill(~(seen | ~rows), torch.finfo(torch.float32).min)
        dense = dense.repeat_interleave(states.shape[1] // seen.shape[2], 2)[:, None]
        return {
            "y": module(inputs["x"], states, raw),
            "mask": dense,
            "full_text_row_masked_out_mask": rows[:, None] * 1.0,
        }

    return MllamaCrossAttentionDecoderLayer(hp["dim"], hp["ff"], hp["heads"], hp.get("kv_heads")), run


BUILDERS: dict[str, Builder] = {
    "gated.openflamingo": Builder(_flamingo, ops=_OPS),
    "gated.lucidrains": Builder(_flamingo, ops=_OPS),
    "gated.idefics": Builder(_idefics, ops=_OPS),
    "gated.mllama": Builder(_mllama, ops=_OPS),
}
