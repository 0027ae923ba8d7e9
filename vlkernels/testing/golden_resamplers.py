"""Goldens of the perceiver resamplers: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import Idefics2Connector, IdeficsPerceiverResampler, LlavaPerceiverResampler, PerceiverResampler
from .golden_builders import DATA_KEYS, Builder, Named, Run, _run_x

_ATTENTION = ("cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv")


def _openflamingo(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "depth", "dim_head", "heads", "num_latents", "max_num_media", "max_num_frames", "ff_mult")
    return PerceiverResampler(**_given(hp)), _run_x


def _lucidrains(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "depth", "dim_head", "heads", "num_latents", "num_media_embeds", "ff_mult")
    return PerceiverResampler(**{"num_media_embeds": 4} | _given(hp)), _run_x


def _llava_next(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "mm_perceiver_depth", "mm_perceiver_latents", "mm_perceiver_ff_mult", "dim_head", "heads")
    return LlavaPerceiverResampler(**_given(hp)), _run_x


def _idefics(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("embed_dim", "depth", "n_heads", "head_dim", "n_latents", "qk_layer_norms", "intermediate_size")

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        return {"output": module(inputs["context"])}

    return IdeficsPerceiverResampler(**_given(hp)), run


def _idefics2(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "vision_hidden", "text_intermediate", "text_hidden", "n_latents", "depth", "n_heads", "head_dim", "n_kv_heads",
        "hidden_act", "rms_norm_eps",
    )  # fmt: skip

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        return {"output": module(inputs["x"], inputs.get("attention_mask"))}

    return Idefics2Connector(
        hp["vision_hidden"],
        hp["text_intermediate"],
        hp["text_hidden"],
        resampler_n_latents=hp["n_latents"],
        resampler_depth=hp["depth"],
        resampler_n_heads=hp["n_heads"],
        resampler_head_dim=hp["head_dim"],
        num_key_value_heads=hp["n_kv_heads"],
        **{key: hp[key] for key in ("hidden_act", "rms_norm_eps") if key in hp},
    ), run


def _given(hp: Named) -> dict:
    """The file's hyper-parameters as constructor words, without those that only size the data."""
    return {key: value for key, value in hp.items() if key not in DATA_KEYS}


BUILDERS: dict[str, Builder] = {
    "resampler.openflamingo": Builder(_openflamingo, ops=_ATTENTION),
    "resampler.lucidrains": Builder(_lucidrains, ops=_ATTENTION),
    "resampler.llava_next_perceiver": Builder(
        _llava_next,
        ops=lambda hp: tuple(op for op in _ATTENTION if op != "mlp_projector" or hp["mm_perceiver_ff_mult"] > 0),
    ),
    "resampler.idefics": Builder(_idefics, ops=_ATTENTION),
    "resampler.idefics2": Builder(_idefics2, ops=_ATTENTION),
}
