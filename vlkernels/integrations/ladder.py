"""Ladders on transformers' models: add, take off, first weights, save and load what is trained.

    model = T5ForConditionalGeneration.from_pretrained("t5-base")  # or a LlamaForCausalLM
    add_ladder(model, reduction=4, importance=fisher_importance(model, batches))
    ...  # train as usual: only the side network requires gradients
    save_ladder(model, "ladder.safetensors")

The equation, the switches and why a fresh ladder is not its backbone: `vlkernels.modules.ladder`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..modules.ladder import Ladder, LadderConfig
from ..modules.ladder_init import prune_llama, prune_t5

_VISUAL = "encoder.visual_embedding."
_FORMAT = "vlkernels.ladder"


def add_ladder(
    model: nn.Module,
    reduction: int = 4,
    *,
    encoder_layers=None,
    decoder_layers=None,
    gate: str = "learned",
    gate_T: float = 0.1,
    gate_alpha: float = 0.0,
    add_residual_after: bool = False,
    pool: bool = False,
    bias: bool = True,
    upstream_text_quirks: bool = False,
    visual: Mapping | None = None,
    importance: Mapping[str, Tensor] | None = None,
    init: str = "backbone",
) -> nn.Module:
    """Put a side network beside a T5ForConditionalGeneration or a LlamaForCausalLM, in place; returns the model.

    The backbone's state dict keeps every name and value and is frozen; what is new requires gradients. The model's
    forward and generate take what they took; the side network's keys and values lie in the same cache. The gradient of
    inputs_embeds that require one goes through the backbone too, which then keeps its activations.

    Args:
        reduction ... upstream_text_quirks: see modules.LadderConfig; encoder_layers is for T5.
        visual: for T5 the options of modules.VisualEmbedding ({"feat_dim": 2048, ...}): `encoder.visual_embedding`
            makes image tokens of forward's vis_feats (B, N, C) and boxes (B, N, 4), for the side network alone. A Llama
            takes vis_embeds (B, N, D), made by a projector of the user's, as they are.
        importance: by parameter name, from `fisher_importance(model, batches)`; None: magnitude.
        init: "backbone": side layers, their norms and the relative position bias from the backbone's, pruned (see
            modules.ladder_init); "random": as transformers' constructors leave them. P and the upsampling are random.

    Raises: TypeError for another model; ValueError naming the argument, what it got and what is accepted.
    """
    config = LadderConfig(
        reduction, encoder_layers, decoder_layers, gate, gate_T, gate_alpha, add_residual_after, pool, bias,
        upstream_text_quirks,
    )  # fmt: skip
    kind = _kind(model)
    if ladder_of(model) is not None:
        raise ValueError("the model has a ladder; remove_ladder(model) takes it off")
    if init not in ("backbone", "random"):
        raise ValueError(f"init is {init!r}; accepted: 'backbone', 'random'")
    if own := [
        n or "the model" for n, m in model.named_modules() if isinstance(m, _kinds(kind)) and "forward" in vars(m)
    ]:
        raise ValueError(f"{own[0]} carries a forward of its own (accelerate's hooks?); add the ladder before them")
    before = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    pruned = None
    if init == "backbone":
        pruned = _pruned(kind, model, before, config, importance)
    parameter = next(model.parameters())
    if kind == "t5":
        from .ladder_t5 import add_to_t5

        if visual is not None and upstream_text_quirks:
            raise ValueError("upstream_text_quirks is True with visual; accepted: False, its VLT5 has none")
        add_to_t5(model, config, None if visual is None else dict(visual))
    else:
        from .ladder_llama import add_to_llama

        if visual is not None or encoder_layers is not None or upstream_text_quirks:
            raise ValueError("visual, encoder_layers and upstream_text_quirks are T5's; accepted: None, None, False")
        add_to_llama(model, config)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in before)
    for name, module in model.named_modules():
        if name.startswith(_VISUAL[:-1]) or "side" in name:
            module.to(parameter.device).train(model.training)
            if not name.endswith("side_rotary_emb"):  # its buffer stays float32
                module.to(parameter.dtype)
    for name, p in model.named_parameters():
        like = before.get(_theirs(name))
        if name not in before and like is not None:
            p.data = p.data.to(like.dtype)  # transformers keeps some of T5's weights in float32
    if pruned is not None:
        _fill(model, before, pruned)
    return model


def remove_ladder(model: nn.Module) -> nn.Module:
    """Take the side network off: the backbone as it was, still frozen. ValueError for a model without a ladder."""
    if ladder_of(model) is None:
        raise ValueError("the model has no ladder; accepted: one that add_ladder was called on")
    if _kind(model) == "t5":
        from .ladder_t5 import remove_from_t5

        remove_from_t5(model)
    else:
        from .ladder_llama import remove_from_llama

        remove_from_llama(model)
    return model


def ladder_of(model: nn.Module) -> LadderConfig | None:
    """The ladder's configuration, None for a model without one."""
    return next((m.side_config for m in model.modules() if isinstance(m, Ladder)), None)


def ladder_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, under the model's names: those with "side" in them and the visual embedding, whose word table is
    the backbone's and stays out."""
    if ladder_of(model) is None:
        raise ValueError("the model has no ladder; accepted: one that add_ladder was called on")
    return {
        name: value
        for name, value in model.state_dict().items()
        if "side" in name or (name.startswith(_VISUAL) and "obj_order_embedding" not in name)
    }


def save_ladder(model: nn.Module, file: str | Path) -> None:
    """Write ladder_state_dict to a safetensors file with the ladder's configuration in its metadata."""
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in ladder_state_dict(model).items()}
    options = dataclasses.asdict(ladder_of(model))
    visual = getattr(getattr(model, "encoder", None), "side_visual", None)
    save_file(tensors, file, {"format": "pt", _FORMAT: json.dumps({"config": options, "visual": visual})})


def load_ladder(model: nn.Module, file: str | Path) -> nn.Module:
    """Read what save_ladder wrote, onto a backbone without a ladder (it gets the file's) or with the same one.

    Raises: ValueError for a file of something else, for another configuration, and for names or shapes that differ.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if _FORMAT not in metadata:
        raise ValueError(f"{Path(file).name} has no {_FORMAT} in its metadata; accepted: a file of save_ladder")
    stored = json.loads(metadata[_FORMAT])
    config = LadderConfig(**stored["config"])
    if (own := ladder_of(model)) is None:
        add_ladder(model, **dataclasses.asdict(config), visual=stored["visual"], init="random")
    elif own != config:
        raise ValueError(f"the model's ladder is {own}, the file's {config}; accepted: the same")
    wanted, found = ladder_state_dict(model), load_file(file)
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the file, {shapes[1]} in the model; accepted: the same shape")
    model.load_state_dict(found, strict=False)
    return model


def _kind(model: nn.Module) -> str:
    names = {f"{cls.__module__}:{cls.__qualname__}" for cls in type(model).__mro__}
    for kind, name in (("t5", "T5ForConditionalGeneration"), ("llama", "LlamaForCausalLM")):
        if f"transformers.models.{kind}.modeling_{kind}:{name}" in names:
            return kind
    raise TypeError(
        f"model is a {type(model).__name__}; accepted: transformers' T5ForConditionalGeneration, LlamaForCausalLM"
    )


def _kinds(kind: str) -> tuple[type, ...]:
    """The classes whose forward a ladder replaces."""
    if kind == "t5":
        from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration, T5Stack

        return T5Stack, T5ForConditionalGeneration
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

    return LlamaModel, LlamaForCausalLM


def _pruned(kind: str, model: nn.Module, state: Mapping, config: LadderConfig, importance) -> dict[str, Tensor]:
    if kind == "t5":
        return prune_t5(state, config.reduction, importance)
    whole = model.config
    return prune_llama(state, config.reduction, whole.num_attention_heads, whole.num_key_value_heads, importance)


def _theirs(name: str) -> str:
    """The backbone's name for a parameter of a side block."""
    return name.replace("side_block", "block" if name.startswith(("encoder", "decoder")) else "layers")


def _fill(model: nn.Module, before: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Side names -> the backbone's: `side_block` is `block` or `layers`, the final norm the backbone's final norm."""
    for name, p in model.named_parameters():
        if name.endswith("relative_attention_bias.weight") and "side_block" in name:
            # the first block of the backbone has it, whichever rung is the first
            p.data.copy_(
                before[f"{name.partition('.')[0]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            )
        elif "side_block" in name:
            p.data.copy_(pruned[_theirs(name)])
        elif "final_side_layer_norm" in name:
            theirs = {
                "encoder": "encoder.final_layer_norm",
                "decoder": "decoder.final_layer_norm",
                "model": "model.norm",
            }
            p.data.copy_(pruned[f"{theirs[name.partition('.')[0]]}.weight"])
