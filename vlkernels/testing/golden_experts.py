"""Goldens of layers with a linear for each modality: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import CogVLMDecoderLayer, MPLUGOwl2DecoderLayer, cogvlm_position_ids, cogvlm_vision_mask
from .golden_builders import Builder, Named, Run


def _cogvlm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "ff", "heads", "kv_heads", "vision_bias", "rope_theta", "token_type_ids", "eps")
    options = {key: hp[key] for key in ("kv_heads", "vision_bias", "rope_theta", "eps") if key in hp}

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        types = inputs["token_type_ids"]
        positions = cogvlm_position_ids(types, inputs.get("attention_mask_2d"))
        return {
            "y": module(inputs["x"], types, inputs.get("attention_mask"), positions),
            "position_ids": positions,
            "vision_token_mask": cogvlm_vision_mask(types),
        }

    return CogVLMDecoderLayer(hp["d"], hp["ff"], hp["heads"], **options), run


def _mplug_owl2(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "ff", "heads", "rope_theta", "eps", "modality_indicators")
    options = {key: hp[key] for key in ("rope_theta", "eps") if key in hp}

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        keys = ("modality_indicators", "attention_mask", "position_ids")
        return {"y": module(inputs["x"], *(inputs.get(key) for key in keys))}

    return MPLUGOwl2DecoderLayer(hp["d"], hp["ff"], hp["heads"], **options), run


BUILDERS: dict[str, Builder] = {
    "expert.cogvlm": Builder(_cogvlm, ops=("modality_linear",)),
    "expert.mplug_owl2": Builder(_mplug_owl2, ops=("modality_linear",)),
}
