"""Goldens of the convolutional abstractors: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

from torch import nn

from ..modules import CAbstractor
from ..modules.conv_abstractor import mobilevlm_projector
from .golden_builders import Builder, Named, Run, _run_x


def _honeybee_c(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "num_input_tokens", "encoder_hidden_size", "hidden_size", "output_hidden_size", "depth", "mlp_depth",
        "num_query_tokens", "pos_emb", "prenorm", "num_eos_tokens",
    )  # fmt: skip
    options = ("depth", "mlp_depth", "num_query_tokens", "pos_emb", "prenorm", "num_eos_tokens")
    return CAbstractor(
        hp["num_input_tokens"],
        hp["encoder_hidden_size"],
        hp["output_hidden_size"],
        hp["hidden_size"],
        **{name: hp[name] for name in options if name in hp},
    ), _run_x


def _honeybee_c_ops(hp: Named) -> tuple[str, ...]:
    blocks = ("conv_se_linear",) if hp.get("depth", 3) else ()
    return blocks + (("mlp_projector",) if hp.get("mlp_depth", 2) > 1 else ())


def _mobilevlm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("mm_projector_type", "mm_hidden_size", "hidden_size", "grid")
    return mobilevlm_projector(hp["mm_projector_type"], hp["mm_hidden_size"], hp["hidden_size"]), _run_x


BUILDERS: dict[str, Builder] = {
    "abstractor.honeybee_c": Builder(_honeybee_c, ops=_honeybee_c_ops),
    "projector.mobilevlm_ldp": Builder(_mobilevlm, ops=("conv_se_linear", "mlp_projector")),
    "projector.mobilevlm_ldpv2": Builder(_mobilevlm, ops=("depthwise_conv_norm_act", "pooled_mlp")),
}
