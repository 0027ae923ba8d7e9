"""peft's DoRA adapters on a lora.Linear. peft 0.21 `tuners/lora/dora.py`, `variants.py`."""

from __future__ import annotations

import torch
from torch import nn

from ..modules._children import child_problem
from ..ops.dora_linear import dora_linear


def problem(layer: nn.Module, name: str, active: int) -> str | None:
    """Why adapter `name`, one of `active` on this layer, must take peft's own forward, or None for a DoRA to fuse."""
    from peft.tuners.lora import dora
    from peft.tuners.lora.variants import DoraLinearVariant

    variant = layer.lora_variant[name]
    if type(variant) is not DoraLinearVariant:
        return f"adapter {name!r} is a {type(variant).__name__}"
    if active > 1:
        return f"adapter {name!r} is DoRA and {active} adapters are active"
    reason = child_problem("lora_magnitude_vector", layer.lora_magnitude_vector[name], (dora.DoraLinearLayer,))
    if reason is not None:
        return reason
    magnitude, weight = layer.lora_magnitude_vector[name].weight, layer.base_layer.weight
    if magnitude.device != weight.device or layer.lora_A[name].weight.device != weight.device:
        return "parts of the adapter are on another device (ephemeral_gpu_offload)"
    if layer.lora_B[name].bias is not None:
        return "a DoRA adapter with a bias"
    if dora.ENABLE_DORA_CACHING and not layer.training:
        return "peft's DoraCaching is on: its forward has the norm already"
    return None


def values(layer: nn.Module, x: torch.Tensor, name: str, arguments: dict) -> tuple:
    """Arguments of dora_linear from those of lora_linear. peft drops out only where the layer itself trains."""
    arguments = {key: value for key, value in arguments.items() if key != "lora_bias"}
    if not layer.training:
        arguments["p"] = 0.0
    return dora_linear.values(x=x, magnitude=layer.lora_magnitude_vector[name].weight, **arguments)
