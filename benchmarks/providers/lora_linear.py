"""lora_linear beside stock peft, plain PyTorch, torch.compile, and peers where they are importable.

On a 4-bit case the baselines hold the dequantised weight: what the same layer costs without quantisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.ops import _nf4
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, _lora_layer, autocast, compiled, frozen_of, leaves_of

BASELINE = "peft"


def plain(x, weight, a, b, bias, lora_bias, scale: float, p: float, low: torch.dtype | None) -> Tensor:
    """The op's equation with torch's own dropout: the reference's mask function serves testing, not speed.

    low: dtype of the low-rank branch where it is not that of x; None leaves it to autocast.
    """
    z = F.dropout(x if low is None else x.to(low), p)
    y = F.linear(x, weight, bias) + F.linear(F.linear(z, a), b, lora_bias) * scale
    return y if low is None else y.to(x.dtype)


def dense(kw: dict) -> dict:
    """The arguments with a weight (N, K) of floats in place of a packed one."""
    if kw["quant"] is None:
        return kw
    shape = kw["b"].shape[0], kw["a"].shape[1]
    weight = _nf4.dequantize(kw["weight"], kw["quant"], shape, kw["blocksize"], kw["quant_dtype"], kw["x"].dtype)
    return kw | {"weight": weight, "quant": None}


def _plain(function):
    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        if kw["base"] is not None:
            raise Unavailable("plain PyTorch is written for one adapter over its layer")
        kw = dense(kw)
        rest = {name: kw[name] for name in ("x", "weight", "a", "b", "bias", "lora_bias", "scale", "p")}
        low = _lora_layer.low_dtype(kw, precision)

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**rest, low=low)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


def peft_layer(case: Case, kw: dict) -> nn.Sequential:
    """A model whose only layer is stock peft's lora.Linear with the case's weights."""
    if kw["base"] is not None:
        raise Unavailable("a second adapter is no layer of its own")
    has_lora_bias = kw["lora_bias"] is not None
    model = _lora_layer.adapted(dense(kw), lora_bias=has_lora_bias)
    if has_lora_bias:
        up = model[0].lora_B["default"]
        up.bias = nn.Parameter(kw["lora_bias"].detach())
        model.leaves["lora_bias"] = up.bias
    return model


stock, swapped = _lora_layer.stock(peft_layer), _lora_layer.swapped(peft_layer)


def _frozen(case: Case, kw: dict, precision: Precision) -> Instance:
    if kw["base"] is not None:
        raise Unavailable("there is no plain layer")
    return _lora_layer.frozen(case, dense(kw), precision)


def _peer_refusals(kw: dict, precision: Precision, dropout: bool) -> None:
    if kw["base"] is not None or kw["bias"] is not None or kw["lora_bias"] is not None:
        raise Unavailable("takes no bias and no second adapter")
    if kw["quant"] is not None:
        raise Unavailable("is called here with a dense weight only")
    if kw["p"] and not dropout:
        raise Unavailable("its fused path takes dropout 0 only")
    if precision.compute == torch.float32:
        raise Unavailable("its kernels are for half precision")


def _unsloth(case: Case, kw: dict, precision: Precision) -> Instance:
    try:
        from unsloth.kernels.fast_lora import LoRA_W
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise Unavailable(f"unsloth is not importable: {error}") from None
    _peer_refusals(kw, precision, dropout=False)

    def forward() -> Tensor:
        with autocast(kw, precision):
            return LoRA_W.apply(kw["x"][None], kw["weight"], None, kw["a"], kw["b"], kw["scale"])[0]

    return Instance(forward, leaves_of(kw), frozen_of(kw))


def _lorafusion(case: Case, kw: dict, precision: Precision) -> Instance:
    try:
        from lorafusion.ops.lora_v1 import fused_linear_lora
    except (ImportError, RuntimeError, ValueError) as error:
        raise Unavailable(f"lorafusion is not importable: {error}") from None
    _peer_refusals(kw, precision, dropout=True)
    if kw["a"].dtype != kw["x"].dtype and precision.autocast is None:
        raise Unavailable("its kernels take adapters in the dtype of x")
    low = precision.compute

    def forward() -> Tensor:
        # as its integration does: adapters cast to x's dtype
        a, b = kw["a"].to(low), kw["b"].to(low)
        y = fused_linear_lora(kw["x"].to(low)[None], kw["weight"].to(low), a, b, kw["scale"], dropout_p=kw["p"])
        return y[0]

    return Instance(forward, leaves_of(kw), frozen_of(kw))


PROVIDERS = (
    Provider("peft", stock),
    Provider("eager", _plain(plain)),
    Provider("compile", _plain(compiled(plain))),
    Provider("frozen linear", _frozen, "bound"),
)


def _one_layer(kw: dict, precision: Precision) -> str | None:
    return "a call with base or with a 4-bit weight keeps the default plan" if _keeps_default(kw) else None


def _one_dtype(kw: dict, precision: Precision) -> str | None:
    if _keeps_default(kw) or kw["weight"].dtype == kw["b"].dtype:
        return _one_layer(kw, precision)
    return f"weight is {kw['weight'].dtype}, B {kw['b'].dtype}: they cannot share a buffer"


def _keeps_default(kw: dict) -> bool:
    return kw["base"] is not None or kw.get("quant") is not None


# (backend, plan of cases.PLANS, why a case cannot follow it)
PLANS = (
    ("triton", "two_source", _one_layer),
    ("triton", "packed", _one_dtype),
    ("cuda", "two_source", _one_layer),
)

# each patches libraries when imported: timed in a process of their own
PEERS = (Provider("unsloth", _unsloth, "peer"), Provider("lorafusion", _lorafusion, "peer"))

# swapped modules that the memory report counts: (name, precision, dropout, ours, baseline)
MODULES = tuple(
    ("peft lora.Linear", precision, p, Provider("swapped", swapped, "ours"), Provider("peft", stock))
    for precision, p in (("bf16", 0.0), ("bf16", 0.05), ("bf16+fp32 amp", 0.05), ("bf16+fp32", 0.05), ("fp32", 0.05))
)


def big_product(case: Case, itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes) of the frozen layer's product, the same forward and backward: cuBLAS runs it in every version."""
    T, K, N = (case[d] for d in "TKN")
    return 2 * T * K * N, itemsize * (T * K + N * K + T * N)


# versions in NOTES.md: (what, precision, side of the memory record that predicts it, provider that is measured)
LADDER = (
    ("stock peft", "bf16+fp32 amp", "baseline", "peft"),
    ("stock peft", "bf16", "baseline", "peft"),
    ("1: cuBLAS + one-pass Triton kernels", "bf16+fp32 amp", "ours", "triton"),
    ("1: cuBLAS + one-pass Triton kernels", "bf16", "ours", "triton"),
    ("2: 1 with the rank-r update in CUDA", "bf16+fp32 amp", "ours", "cuda"),
    ("2: 1 with the rank-r update in CUDA", "bf16", "ours", "cuda"),
)
