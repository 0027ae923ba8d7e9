"""The projections of a decoder block with stock peft adapters, beside the group ops lora_qkv and lora_mlp."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, autocast

ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class Block(nn.Module):
    """norm, the projections and what joins them, as transformers' Llama and Gemma have them."""

    def __init__(self, join: Callable, layers: dict[str, nn.Linear], norm: nn.Module | None):
        super().__init__()
        self.join, self.norm = join, norm
        for name, layer in layers.items():
            self.add_module(f"{name}_proj", layer)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.join(self, x, x if self.norm is None else self.norm(x))


def block(names: tuple[str, ...], join: Callable, kw: dict) -> Block:
    """Stock peft layers with the case's weights; `leaves` are the tensors that get gradients, by argument name."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
    except ImportError as error:
        raise Unavailable(f"peft or transformers is not importable: {error}") from None
    if kw.get("offset"):
        raise Unavailable("the norm is Llama's")
    x, layers, leaves = kw["x"], {}, {"x": kw["x"]}
    for name in names:
        weight, bias = kw[f"{name}_weight"], kw[f"{name}_bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=x.device, dtype=x.dtype)
        layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        layers[name] = layer
    norm = None
    if kw["norm_weight"] is not None:
        norm = LlamaRMSNorm(x.shape[-1], eps=1e-6)
        norm.weight = nn.Parameter(kw["norm_weight"].detach())
    adapted = [name for name in names if kw[f"{name}_a"] is not None]
    model = Block(join, layers, norm)
    config = LoraConfig(
        r=1,
        lora_dropout=kw["p"],
        target_modules=[f"{name}_proj" for name in adapted],
        rank_pattern={f"{name}_proj": kw[f"{name}_a"].shape[0] for name in adapted},
        alpha_pattern={f"{name}_proj": kw[f"{name}_a"].shape[0] * kw[f"{name}_scale"] for name in adapted},
    )
    inject_adapter_in_model(config, model)
    for name in names:
        if kw[f"{name}_bias"] is not None:
            stock = getattr(model, f"{name}_proj")
            leaves[f"{name}_bias"] = getattr(stock, "base_layer", stock).bias.requires_grad_()
    for name in adapted:
        down, up = (getattr(getattr(model, f"{name}_proj"), part)["default"] for part in ("lora_A", "lora_B"))
        down.weight, up.weight = (nn.Parameter(kw[f"{name}_{f}"].detach()) for f in "ab")
        leaves |= {f"{name}_a": down.weight, f"{name}_b": up.weight}
    if norm is not None:
        leaves["norm_weight"] = norm.weight.requires_grad_()
    model.leaves = leaves
    return model.train()


def stock(names: tuple[str, ...], join: Callable, change: Callable = lambda model: model) -> Callable:
    """A provider's build: the block with peft's layers, after `change`."""

    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        model = block(names, join, kw)
        call = change(model)

        def forward() -> Tensor | tuple[Tensor, ...]:
            with autocast(kw, precision):
                return call(kw["x"])

        return Instance(forward, model.leaves, tuple(model.parameters()))

    return build


def _singles(model: Block) -> Block:
    import vlkernels

    vlkernels.swap(model, strict=True)
    return model


def providers(names: tuple[str, ...], join: Callable) -> tuple[Provider, ...]:
    return (
        Provider("peft", stock(names, join)),
        Provider("compile", stock(names, join, lambda model: torch.compile(model, dynamic=False))),
        # each layer its own node: what the group op is to beat among our own
        Provider("one lora_linear a layer", stock(names, join, _singles)),
    )


def unsloth(names: tuple[str, ...], kw: dict, precision: Precision) -> list:
    """weight, quantisation state, A, B and scale of each projection, as Unsloth's functions take them one by one."""
    # all of these switch its fused path off in its own integration
    if kw["p"]:
        raise Unavailable("its fused path takes dropout 0 only")
    biases = [kw[f"{name}_{kind}"] for name in names for kind in ("bias", "lora_bias")]
    if any(b is not None for b in biases) or any(kw[f"{name}_a"] is None for name in names):
        raise Unavailable("takes projections without bias, all of them adapted")
    if kw["norm_weight"] is not None or kw.get("residual"):
        raise Unavailable("takes neither the norm nor the residual")
    if any(kw.get(f"{name}_quant") is not None for name in names):
        raise Unavailable("is called here with dense weights only")
    if precision.compute == torch.float32:
        raise Unavailable("its kernels are for half precision")
    each = ([kw[f"{n}_weight"], None, kw[f"{n}_a"], kw[f"{n}_b"], kw[f"{n}_scale"]] for n in names)
    return [value for values in each for value in values]
