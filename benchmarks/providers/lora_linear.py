"""lora_linear beside stock peft, plain PyTorch, torch.compile, and peers where they are importable.

On a 4-bit case the baselines hold the dequantised weight: what the same layer costs without quantisation.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.ops import _nf4
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, autocast, frozen_of, leaves_of

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
        low = None if precision.autocast or kw["a"].dtype == kw["x"].dtype else kw["a"].dtype

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**rest, low=low)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


@functools.cache
def _compiled():
    return torch.compile(plain, dynamic=False)


def _compiled_plain(**kw) -> Tensor:
    return _compiled()(**kw)


def peft_layer(case: Case, kw: dict) -> nn.Sequential:
    """A model whose only layer is stock peft's lora.Linear with the case's weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not importable: {error}") from None
    if kw["base"] is not None:
        raise Unavailable("a second adapter is no layer of its own")
    kw = dense(kw)
    rank, width = kw["a"].shape
    base = nn.Linear(width, kw["b"].shape[0], bias=kw["bias"] is not None, device=kw["x"].device, dtype=kw["x"].dtype)
    base.weight = nn.Parameter(kw["weight"].detach(), requires_grad=kw["weight"].requires_grad)
    trainable = {"weight": base.weight} if kw["weight"].requires_grad else {}
    if kw["bias"] is not None:
        base.bias = nn.Parameter(kw["bias"].detach())
        trainable["bias"] = base.bias
    has_lora_bias = kw["lora_bias"] is not None
    config = LoraConfig(
        r=rank, lora_alpha=rank * kw["scale"], lora_dropout=kw["p"], target_modules=["0"], lora_bias=has_lora_bias
    )
    model = nn.Sequential(base)
    inject_adapter_in_model(config, model)
    layer = model[0]
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    down.weight, up.weight = nn.Parameter(kw["a"].detach()), nn.Parameter(kw["b"].detach())
    if has_lora_bias:
        up.bias = nn.Parameter(kw["lora_bias"].detach())
        trainable["lora_bias"] = up.bias
    for t in trainable.values():
        t.requires_grad_()
    model.leaves = {"x": kw["x"], "a": down.weight, "b": up.weight} | trainable
    return model.train()


def _peft(case: Case, kw: dict, precision: Precision) -> Instance:
    return _module(peft_layer(case, kw), kw, precision)


def _module(model: nn.Sequential, kw: dict, precision: Precision) -> Instance:
    def forward() -> Tensor:
        with autocast(kw, precision):
            return model(kw["x"])

    return Instance(forward, model.leaves, tuple(model.parameters()))


def swapped(case: Case, kw: dict, precision: Precision) -> Instance:
    """The same peft layer after vlkernels.swap; use_backend() chooses where it runs."""
    import vlkernels

    model = peft_layer(case, kw)
    vlkernels.swap(model, strict=True)
    return _module(model, kw, precision)


def _frozen(case: Case, kw: dict, precision: Precision) -> Instance:
    """The frozen layer alone: no adapter makes it faster."""
    if kw["base"] is not None:
        raise Unavailable("there is no plain layer")
    kw = dense(kw)

    def forward() -> Tensor:
        with autocast(kw, precision):
            return F.linear(kw["x"], kw["weight"], kw["bias"])

    leaves = {name: t for name, t in leaves_of(kw).items() if name in ("x", "weight", "bias")}
    return Instance(forward, leaves, frozen_of(kw))


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
    Provider("peft", _peft),
    Provider("eager", _plain(plain)),
    Provider("compile", _plain(_compiled_plain)),
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
    ("peft lora.Linear", precision, p, Provider("swapped", swapped, "ours"), Provider("peft", _peft))
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
