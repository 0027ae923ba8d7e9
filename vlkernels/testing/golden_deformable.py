"""Goldens of deformable attention and the D-Abstractor: hyper-parameters -> our module, and its call."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import DAbstractor
from ..ops.deformable_attention import deformable_attention
from .golden_builders import Builder, GoldenError, Named, Run, _accept, _run_x


def _d_abstractor(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "num_input_tokens", "encoder_hidden_size", "d_model", "output_hidden_size", "decoder_layers", "heads", "ffn",
        "n_points", "num_queries", "num_eos_tokens", "pos_emb", "pooled_v_target", "num_feature_levels", "activation",
    )  # fmt: skip
    if hp.get("num_feature_levels", 1) != 1:
        raise GoldenError(f"hyper-parameter num_feature_levels is {hp['num_feature_levels']!r}; accepted: 1")
    if "activation" in hp:
        _accept(hp, "activation", "relu")
    return DAbstractor(
        hp["num_input_tokens"],
        hp["encoder_hidden_size"],
        hp["output_hidden_size"],
        hp["d_model"],
        hp["num_queries"],
        hp["decoder_layers"],
        hp["heads"],
        hp["ffn"],
        hp["n_points"],
        pooled_v_target=hp["pooled_v_target"],
        num_eos_tokens=hp["num_eos_tokens"],
        pos_emb=hp["pos_emb"],
    ), _run_x


def _ms_deform_attn(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("batch", "spatial_shapes", "heads", "head_dim", "queries", "points")
    return nn.Module(), _sample


def _sample(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
    """The bare operator: sampling locations and weights are ready."""
    shapes = inputs["spatial_shapes"].tolist()
    y = deformable_attention(
        inputs["value"], inputs["sampling_locations"], inputs["attention_weights"], shapes=shapes, softmax=False
    )
    return {"output": y.flatten(-2)}


_D_OPS = (
    "cross_attention", "deformable_attention", "linear_projector", "mlp_projector", "multi_layer_kv", "norm_residual",
)  # fmt: skip

BUILDERS: dict[str, Builder] = {
    "abstractor.honeybee_d": Builder(_d_abstractor, ops=_D_OPS),
    "op.ms_deform_attn": Builder(_ms_deform_attn, ops=("deformable_attention",)),
}
