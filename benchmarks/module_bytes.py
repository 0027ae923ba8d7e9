"""Bytes that modules keep for backward at published sizes, each beside upstream's own code: `benchmarks.modules` kept.

Shapes alone are run, on meta tensors: the kernels' operators say there what they keep. Eager is upstream's equation in
plain PyTorch over the same parameters. x and what goes in beside it count where eager keeps them, unless said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlkernels
from vlkernels.modules import (
    SS2D,
    CAbstractor,
    CogVLMDecoderLayer,
    DAbstractor,
    GatedCrossAttentionBlock,
    LDPNetProjector,
    LDPNetV2Projector,
    MPLUGOwl2DecoderLayer,
)
from vlkernels.testing import meter

from . import upstream_blocks, upstream_maps


class _RMSNorm(torch.autograd.Function):
    """What torch's fused RMSNorm keeps on a GPU; elsewhere torch writes its parts out."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:2])


def _rms_norm(x: Tensor, shape, weight: Tensor, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(x, weight)


class _Flash(torch.autograd.Function):
    """What torch's attention keeps on a GPU; on meta tensors torch would take the equation with its scores instead."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attention(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    return _Flash.apply(q, k, v)


GPU = {"scaled_dot_product_attention": _attention, "rms_norm": _rms_norm}
LEVELS = {"level 0": {"level": 0}, "level 1": {"level": 1}}


@dataclass(frozen=True)
class Kept:
    """One module. per: what one of its inputs is; units: how many of them a call has. made(device, **options) ->
    module; versions: name -> options of ours; eager: name -> (module, inputs) -> y; inputs: device -> tensors."""

    title: str
    per: str
    made: Callable[..., nn.Module]
    inputs: Callable[[str], tuple[Tensor, ...]]
    eager: dict[str, Callable]
    call: Callable = lambda module, *inputs: module(*inputs)
    versions: dict[str, dict] = field(default_factory=lambda: LEVELS)
    units: int = 1
    apart: Callable[[tuple], tuple] = lambda inputs: ()
    # rows that boolean masks pick have no shape on meta tensors
    eager_on: str = "meta"


def _tokens(*shape: int) -> Callable[[str], tuple]:
    return lambda device: (torch.empty(shape, dtype=torch.bfloat16, device=device),)


def _by_name(equation: Callable) -> Callable:
    return lambda module, *inputs: equation(dict(module.named_parameters()), *inputs)


def _sequence(device: str) -> tuple[Tensor, Tensor]:
    """One image of 1225 tokens between its two edges, and 255 of text."""
    types = torch.zeros(1, 1482, dtype=torch.int64)
    types[:, 1:1228] = 1
    return torch.zeros(1, 1482, 4096, dtype=torch.bfloat16, device=device), types.to(device)


def _flamingo(device: str) -> tuple[Tensor, ...]:
    x = torch.empty(1, 256, 4096, dtype=torch.bfloat16, device=device)
    media = torch.empty(1, 5, 64, 1024, dtype=torch.bfloat16, device=device)
    locations = torch.zeros(1, 256, dtype=torch.bool, device=device)
    return x, media, locations


def _layer(kind: type, *sizes, **options) -> Callable[..., nn.Module]:
    return lambda **made: kind(*sizes, **options, **made)


_experts = {"eager": upstream_blocks.expert_layer,
            "eager, torch's attention": lambda *args: upstream_blocks.expert_layer(*args, flash=True)}  # fmt: skip
KEPT = {
    "c_abstractor": Kept(
        "Honeybee's C-Abstractor, 576 to 144 tokens, depth 3", "image", _layer(CAbstractor, 576, 1024, 4096),
        _tokens(1, 576, 1024), {"eager": _by_name(upstream_maps.c_abstractor(12))}),
    "ldp": Kept(
        "MobileVLM's LDP, 2048 wide", "image", _layer(LDPNetProjector, 1024, 2048), _tokens(1, 576, 1024),
        {"eager": _by_name(upstream_maps.ldp)}),
    "ldpv2": Kept(
        "MobileVLM's LDPv2, 2048 wide", "image", _layer(LDPNetV2Projector, 1024, 2048), _tokens(1, 576, 1024),
        {"eager": _by_name(upstream_maps.ldpv2)}),
    "d_abstractor 256": Kept(
        "Honeybee's D-Abstractor, 256 tokens", "image", _layer(DAbstractor, 256, 1024, 4096, dropout=0.0),
        _tokens(1, 256, 1024), {"eager": _by_name(upstream_maps.d_abstractor(8, 4, "query"))}),
    "d_abstractor 576": Kept(
        "Honeybee's D-Abstractor, 576 tokens", "image", _layer(DAbstractor, 576, 1024, 4096, dropout=0.0),
        _tokens(1, 576, 1024), {"eager": _by_name(upstream_maps.d_abstractor(8, 4, "query"))}),
    "ss2d": Kept(
        "VMamba's SS2D, 1024 wide, four directions", "image", _layer(SS2D, 1024), _tokens(1, 24, 24, 1024),
        {"eager": upstream_maps.ss2d}, versions={"fused": {}}),
    "gated": Kept(
        "OpenFlamingo-9B's gated block", "text token", _layer(GatedCrossAttentionBlock, 4096, 1024), _flamingo,
        {"eager": lambda block, *inputs: upstream_blocks.FlamingoBlock(block)(*inputs)}, units=256,
        apart=lambda inputs: inputs[1:2]),
    "cogvlm": Kept(
        "CogVLM's layer, 490-pixel image", "sequence of 1482", _layer(CogVLMDecoderLayer, 4096, 11008, 32), _sequence,
        _experts, versions={"fused": {}}, apart=lambda inputs: inputs[:1], eager_on="cpu"),
    "cogvlm2": Kept(
        "CogVLM2's layer", "sequence of 1482",
        _layer(CogVLMDecoderLayer, 4096, 14336, 32, 8, vision_bias=True, rope_theta=500000.0), _sequence, _experts,
        versions={"fused": {}}, apart=lambda inputs: inputs[:1], eager_on="cpu"),
    "mplug_owl2": Kept(
        "mPLUG-Owl2's layer", "sequence of 1482", _layer(MPLUGOwl2DecoderLayer, 4096, 11008, 32), _sequence, _experts,
        versions={"fused": {}}, apart=lambda inputs: inputs[:1], eager_on="cpu"),
}  # fmt: skip


def kept(subject: Kept, on_meta: Callable) -> Iterator[dict]:
    """A dict per version: its name, the bytes that one unit keeps, and its share of each eager version's."""
    baselines = []
    for name, call in subject.eager.items():
        module = subject.made(device=subject.eager_on, dtype=torch.bfloat16)
        inputs = subject.inputs(subject.eager_on)
        inputs[0].requires_grad_()
        apart = [*module.parameters(), *subject.apart(inputs)]
        bytes_ = meter.saved_bytes(lambda: call(module, *inputs), apart)  # noqa: B023
        baselines.append(bytes_)
        yield {"version": name, "bytes": bytes_ // subject.units}
    for name, options in subject.versions.items():
        with on_meta(), mock.patch.multiple(F, **GPU), vlkernels.use_backend("triton"):
            module = subject.made(device="meta", dtype=torch.bfloat16, **options)
            inputs = subject.inputs("meta")
            inputs[0].requires_grad_()
            apart = [*module.parameters(), *subject.apart(inputs)]
            bytes_ = meter.saved_bytes(lambda: subject.call(module, *inputs), apart)  # noqa: B023
        yield {
            "version": name,
            "bytes": bytes_ // subject.units,
            "of": [round(bytes_ / b, 3) for b in baselines],
        }
