"""Upstream's parameter names of bottleneck adapters, with those of the layers around them: mostly ours are theirs."""

from __future__ import annotations

from .prefix_keys import _BLOCK, Rows, _below, _both, _same

_MAGMA: Rows = (*_both("adapter.{i}"), *_same("adapter_scale"))
_HYPER = ("down_sampler_hyper_net", "up_sampler_hyper_net")
# adapters/adapter_modeling.py: of Linears, and of Kronecker products or low rank
_TASKS: Rows = (
    *_both("adapters.{task}.{sampler}", "pre_layer_norm", "post_layer_norm"),
    *_same(*(f"adapters.{{task}}.{{sampler}}.{p}" for p in ("phm_rule", "W", "W_left", "W_right", "b"))),
)
_BART: Rows = _both("{name}", "{attention}.{linear}")
_REP: Rows = _both("conv_A", "conv_B", "conv_D", "expert_weights")

ADAPTER_MAPS: dict[str, Rows] = {
    # adapters/methods/modeling.py, and the block's own norm
    "adapter.adapterhub": (
        *_both("layer_norm", "adapter.adapter_down.{i}", "adapter.{part}"),
        *_same("adapter.scaling"),
    ),
    # below mlp.1. or attn.; the wrapped module keeps its own names
    "adapter.magma": (
        *_MAGMA,
        *_both("module", "module.{linear}", "attn_block", "attn_block.{linear}"),
    ),
    "adapter.vl_adapter": (*_below(_TASKS, "ctrl."), *_same("phm_rule", "ctrl.phm_rule")),
    "adapter.vl_adapter_compacter": (*_below(_TASKS, "ctrl."), *_same("phm_rule", "ctrl.phm_rule")),
    "adapter.vl_adapter_low_rank": _below(_TASKS, "ctrl."),
    "adapter.vl_adapter_hyperformer": (
        *_same("task_embed.task_to_embeddings.{task}", "hyper.layer_id_embeddings.weight"),
        *_same("hyper.adapters_block_type.weight"),
        *_both("hyper.LayerNorm", "hyper.task_hypernet.task_embeding_generator.{i}"),
        *_both(*(f"hyper.{net}.{{generator}}.0" for net in _HYPER)),
        *_both("hyper.{net}_layernorm_hypernet.{generator}"),
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
        *_both("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm", "self_attn.{linear}"),
    ),
    "adapter.vl_pet_decoder": (
        *_BART,
        *_below(_TASKS, "encoder_attn.attn_value_parallel_adapter."),
    ),
    "adapter.lavin": _REP,
    "adapter.lavin_rep": _REP,
    "adapter.lavin_block": _below((*_BLOCK, *_below(_REP, "{adapter}.")), "layers.{l}."),
    "adapter.frozenbilm": _both("down", "up", "ln"),
    "adapter.frozenbilm_output": _both("dense", "LayerNorm", "adapter.{part}"),
}
