"""Whether a fused forward may read a child's weights itself."""

from __future__ import annotations

import torch
from torch import nn


def child_problem(name: str, child: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """Why a fused forward must not read the child's weights itself, or None.

    It would skip the child's hooks, its instance forward, its subclass's forward (a LoRA on it) or its sharding.
    """
    if type(child) not in kinds:
        return f"{name} is a {type(child).__name__}"
    if (reason := hook_problem(name, child)) is not None:
        return reason
    for parameter in child._parameters.values():
        if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
            return f"{name} holds a {type(parameter).__name__}, not a plain tensor"
        if parameter is not None and (parameter.numel() == 0 or hasattr(parameter, "ds_id")):
            return f"{name} holds a parameter that is gathered elsewhere"
    if "weight" in child.__dict__ or hasattr(child, "parametrizations"):
        return f"{name} is parametrised"
    return None


def hook_problem(name: str, child: nn.Module) -> str | None:
    """Why a fused forward must call the child instead of doing its work, or None."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"{name} carries hooks"
    return f"{name} carries a forward of its own" if "forward" in child.__dict__ else None
