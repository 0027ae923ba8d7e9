"""lora_mlp beside a feed-forward block of stock peft layers."""

from __future__ import annotations

from torch import Tensor

from vlkernels.testing.case import Case, Precision

from . import Instance, _lora_groups

BASELINE = "peft"


def _joined(kw: dict):
    act, residual = _lora_groups.ACTS[kw["act"]], kw["residual"]

    def join(model, x: Tensor, h: Tensor) -> Tensor:
        y = model.down_proj(act(model.gate_proj(h)) * model.up_proj(h))
        return x + y if residual else y

    return join


def _of(provider: str):
    """The activation is the case's, so the block is made when the arguments are there."""

    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        made = _lora_groups.providers(("gate", "up", "down"), _joined(kw))
        return next(p for p in made if p.name == provider).build(case, kw, precision)

    return build


PROVIDERS = tuple(_lora_groups.Provider(name, _of(name)) for name in ("peft", "compile", "one lora_linear a layer"))
PEERS = ()
