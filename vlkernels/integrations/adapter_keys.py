"""Upstream's parameter names of bottleneck adapters, with those of the layers around them: mostly ours are theirs."""

from __future__ import annotations

from ._rows import Rows, below, both, same
from .prefix_keys import _BLOCK

_MAGMA: Rows = (*both("adapter.{i}"), *same("adapter_scale"))
_HYPER = ("down_sampler_hyper_net", "up_sampler_hyper_net")
# adapters/adapter_modeling.py: of Linears, and of Kronecker products or low rank
_TASKS: Rows = (
    *both("adapters.{task}.{sampler}", "pre_layer_norm", "post_layer_norm"),
    *same(*(f"adapters.{{task}}.{{sampler}}.{p}" for p in ("phm_rule", "W", "W_left", "W_right", "b"))),
)
_BART: Rows = both("{name}", "{attention}.{linear}")
_REP: Rows = both("conv_A", "conv_B", "conv_D", "expert_weights")

ADAPTER_MAPS: dict[str, Rows] = {
    # adapters/methods/modeling.py, and the block's own norm
    "adapter.adapterhub": (
        *both("layer_norm", "adapter.adapter_down.{i}", "adapter.{part}"),
        *same("adapter.scaling"),
    ),
    # below mlp.1. or attn.; the wrapped module keeps its own names
    "adapter.magma": (
        *_MAGMA,
        *both("module", "module.{linear}", "attn_block", "attn_block.{linear}"),
    ),
    "adapter.vl_adapter": (*below(_TASKS, "ctrl."), *same("phm_rule", "ctrl.phm_rule")),
    "adapter.vl_adapter_compacter": (*below(_TASKS, "ctrl."), *same("phm_rule", "ctrl.phm_rule")),
    "adapter.vl_adapter_low_rank": below(_TASKS, "ctrl."),
    "adapter.vl_adapter_hyperformer": (
        *same("task_embed.task_to_embeddings.{task}", "hyper.layer_id_embeddings.weight"),
        *same("hyper.adapters_block_type.weight"),
        *both("hyper.LayerNorm", "hyper.task_hypernet.task_embeding_generator.{i}"),
        *both(*(f"hyper.{net}.{{generator}}.0" for net in _HYPER)),
        *both("hyper.{net}_layernorm_hypernet.{generator}"),
    ),
    # my_transformers/modeling_bart.py, below model.encoder.layers.<i>.: ours are nested
    "adapter.vl_pet": (
        *(
            (their.format(s=s, p=p), our.format(s=s, p=p))
            for s in ("attn", "ff")
            for p in ("weight", "bias")
            for their, our in (
                ("{s}_adapter_multihead_down.{{j}}.{p}", "{s}_adapter.multihead_down.{{j}}.{p}"),
                ("{s}_adapter_multihead_up.{p}", "{s}_adapter.multihead_up.{p}"),
                ("encoder_{s}_adapter_gating_{{gate}}.{p}", "{s}_adapter.gating_{{gate}}.{p}"),
            )
        ),
        *((f"encoder_{s}_adapter_gating_{{gate}}", f"{s}_adapter.gating_{{gate}}") for s in ("attn", "ff")),
        *both("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm", "self_attn.{linear}"),
    ),
    "adapter.vl_pet_decoder": (
        *_BART,
        *below(_TASKS, "encoder_attn.attn_value_parallel_adapter."),
    ),
    "adapter.lavin": _REP,
    "adapter.lavin_rep": _REP,
    "adapter.lavin_block": below((*_BLOCK, *below(_REP, "{adapter}.")), "layers.{l}."),
    "adapter.frozenbilm": both("down", "up", "ln"),
    "adapter.frozenbilm_output": both("dense", "LayerNorm", "adapter.{part}"),
}
