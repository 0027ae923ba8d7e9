"""lora_mlp beside a feed-forward block of stock peft layers."""

from __future__ import annotations

from torch import Tensor

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, _lora_groups, autocast, frozen_of, leaves_of

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


def _unsloth(case: Case, kw: dict, precision: Precision) -> Instance:
    try:
        from unsloth.kernels import fast_lora, geglu, swiglu
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise Unavailable(f"unsloth is not importable: {error}") from None
    projections = _lora_groups.unsloth(("gate", "up", "down"), kw, precision)
    act, act_backward = {
        "silu": lambda: (swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel),
        "gelu": lambda: (geglu.geglu_exact_forward_kernel, geglu.geglu_exact_backward_kernel),
        "gelu_tanh": lambda: (geglu.geglu_approx_forward_kernel, geglu.geglu_approx_backward_kernel),
    }[kw["act"]]()

    def forward() -> Tensor:
        with autocast(kw, precision):
            # in place it would write dx over x, which the next repetition reads
            return fast_lora.LoRA_MLP.apply(kw["x"][None], *projections, act, act_backward, False)[0]

    return Instance(forward, leaves_of(kw), frozen_of(kw))


PROVIDERS = tuple(Provider(name, _of(name)) for name in ("peft", "compile", "one lora_linear a layer"))
# patches libraries when imported: timed in a process of its own
PEERS = (Provider("unsloth", _unsloth, "peer"),)
