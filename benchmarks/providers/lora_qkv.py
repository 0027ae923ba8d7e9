"""lora_qkv beside three stock peft layers."""

from __future__ import annotations

from torch import Tensor

from . import _lora_groups

BASELINE = "peft"


def _join(model, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return model.q_proj(h), model.k_proj(h), model.v_proj(h)


PROVIDERS = _lora_groups.providers(("q", "k", "v"), _join)
PEERS = ()
