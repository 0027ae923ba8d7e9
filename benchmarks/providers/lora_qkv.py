"""lora_qkv beside three stock peft layers."""

from __future__ import annotations

from torch import Tensor

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, _lora_groups, autocast, frozen_of, leaves_of

BASELINE = "peft"


def _join(model, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return model.q_proj(h), model.k_proj(h), model.v_proj(h)


def _unsloth(case: Case, kw: dict, precision: Precision) -> Instance:
    try:
        from unsloth.kernels.fast_lora import LoRA_QKV
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise Unavailable(f"unsloth is not importable: {error}") from None
    projections = _lora_groups.unsloth(("q", "k", "v"), kw, precision)

    def forward() -> tuple[Tensor, ...]:
        with autocast(kw, precision):
            # in place it would write dx over x, which the next repetition reads
            return LoRA_QKV.apply(kw["x"][None], *projections, False)

    return Instance(forward, leaves_of(kw), frozen_of(kw))


PROVIDERS = _lora_groups.providers(("q", "k", "v"), _join)
# patches libraries when imported: timed in a process of its own
PEERS = (Provider("unsloth", _unsloth, "peer"),)
