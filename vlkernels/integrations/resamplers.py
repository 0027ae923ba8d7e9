"""transformers' perceiver resamplers (Idefics, Idefics2, Kosmos-2) with a fused forward.

A swapped resampler runs `modules.resampler_layers` over its own children, through views of our classes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import backends
from ..modules.resampler_layers import (
    FeedForward,
    ResamplerAttention,
    ResamplerLayer,
    context_sources,
    packed_weights,
    queries,
    resample,
)
from ..modules.resampler_media import Media
from ..ops.cross_attention import cross_attention
from ._views import Viewed, problem, view_of
from .swap import Shown, class_key, finished, training_backend
from .transformers import _act_name, _acts, projector_class

IDEFICS = "idefics.perceiver:IdeficsPerceiverResampler"
IDEFICS2 = "idefics2.modeling_idefics2:Idefics2PerceiverResampler"
KOSMOS2 = "kosmos2.modeling_kosmos2:Kosmos2ImageToTextProjection"
KEYS = (IDEFICS, IDEFICS2, KOSMOS2)

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


def _rms_view(norm: nn.Module) -> nn.RMSNorm:
    """nn.RMSNorm with the weight of transformers' class."""
    view = nn.RMSNorm.__new__(nn.RMSNorm)
    nn.Module.__init__(view)
    view.normalized_shape, view.eps, view.elementwise_affine = tuple(norm.weight.shape), norm.variance_epsilon, True
    view.weight = norm.weight
    return view


def _attention(
    block: nn.Module, out: str, dropout: float = 0.0, bias: bool = False, **norms: str
) -> ResamplerAttention:
    names = {**norms, **_PROJECTIONS, "out": out}
    children = {role: getattr(block, name) for role, name in names.items()}
    return view_of(ResamplerAttention, names, children, head_dim=block.head_dim, dropout=dropout, bias=bias)


def _idefics(m: nn.Module, level: int, acts: dict) -> tuple[list[nn.Module], nn.Module]:
    norms = {"context_norm": "context_layer_norm", "latents_norm": "latents_layer_norm"}
    layers = []
    for attention, mlp in m.blocks:
        heads = {"q_norm": "q_layer_norm", "k_norm": "k_layer_norm"} if attention.qk_layer_norms else {}
        parts = {"norm": "ln", "up": "fc", "down": "c_proj"}
        ffn = view_of(
            FeedForward, parts, {role: getattr(mlp, name) for role, name in parts.items()},
            act=_act_name(mlp.act, acts), level=level,
        )  # fmt: skip
        attention = _attention(attention, "output_proj", **norms, **heads)
        layers.append(view_of(ResamplerLayer, {"attention": "0", "ffn": "1"}, {"attention": attention, "ffn": ffn}))
    return layers, m.layer_norm


def _idefics2(m: nn.Module, level: int, acts: dict) -> tuple[list[nn.Module], nn.Module]:
    outer = {
        "latents_norm": "input_latents_norm", "context_norm": "input_context_norm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    layers = []
    for layer in m.layers:
        ffn = view_of(
            FeedForward, parts, {role: getattr(layer.mlp, name) for role, name in parts.items()},
            act=_act_name(layer.mlp.act_fn, acts), level=level,
        )  # fmt: skip
        attention = _attention(layer.self_attn, "o_proj", layer.self_attn.attention_dropout)
        children = {role: _rms_view(getattr(layer, name)) for role, name in outer.items()}
        children |= {"attention": attention, "ffn": ffn}
        # dropout acts where the model trains, which a view does not follow by itself
        layers.append(view_of(ResamplerLayer, {**outer, "attention": "self_attn", "ffn": "mlp"}, children))
    return layers, _rms_view(m.norm)


class _Resampler(Viewed):
    """Beside a resampler of transformers in its swapped class."""

    def _vlkernels_values(self, x: Tensor) -> tuple | str:
        """Arguments of one cross_attention of the module on x, or why this call is upstream's own."""
        if (reason := problem(self, self._vlkernels_kinds, self._vlkernels_acts)) is not None:
            return reason
        weight = self._vlkernels_attention().q_proj.weight
        if x.dim() != 3:
            return f"an input of shape {tuple(x.shape)}"
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            return f"x is {x.dtype} over {weight.dtype} weights without autocast"
        attention = self._vlkernels_attention()
        K = attention.head_dim
        heads, groups = (linear.weight.shape[0] // K for linear in (attention.q_proj, attention.k_proj))
        q = torch.empty((1, self._vlkernels_latents().shape[0], heads, K), dtype=x.dtype, device=x.device)
        k = torch.empty((1, x.shape[1], groups, K), dtype=x.dtype, device=x.device)
        return cross_attention.values(q, k, k)

    def vlkernels_state(self) -> tuple[str, str]:
        """(backend, reason) for a training step in this module's present state."""
        weight = self._vlkernels_attention().k_proj.weight
        x = torch.empty((1, 64, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        return training_backend(cross_attention, self._vlkernels_values(x))


@functools.cache
def resampler_class(original: type) -> type:
    """The static subclass of a class of KEYS that swapped resamplers get."""
    key = class_key(original).removeprefix("transformers.models.")
    return _kosmos2_class(original) if key == KOSMOS2 else _perceiver_class(original, key)


def _perceiver_class(original: type, key: str) -> type:
    import importlib

    acts = {**_acts(), nn.GELU: "gelu"}
    module = importlib.import_module(original.__module__)
    names = {
        IDEFICS: ("IdeficsPerceiverAttention", "IdeficsMLP"),
        IDEFICS2: ("Idefics2PerceiverLayer", "Idefics2PerceiverAttention", "Idefics2MLP", "Idefics2RMSNorm"),
    }[key]
    kinds = tuple(getattr(module, name) for name in names)
    if key == IDEFICS2:
        kinds += (projector_class(module.Idefics2MLP),)  # swapped by itself
    layers = _idefics if key == IDEFICS else _idefics2

    class Fused(_Resampler, original, metaclass=Shown):
        _vlkernels_kinds, _vlkernels_acts = kinds, acts

        def forward(self, context: Tensor, attention_mask: Tensor | None = None, **kwargs):
            values = "called with keyword arguments" if kwargs else self._vlkernels_values(context)
            if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
                values = f"a mask of shape {tuple(attention_mask.shape)}"
            if isinstance(values, str) or backends.choose(cross_attention, values) == "reference":
                mask = () if key == IDEFICS else (attention_mask,)
                return super().forward(context, *mask, **kwargs)
            stack, norm = self._vlkernels_view(lambda: layers(self, 0, acts))
            for layer in stack:
                layer.part("attention").training = self.training
            mask = None if attention_mask is None else attention_mask != 0
            return resample(self.latents, stack, norm, Media(context, mask, None), 0)

        def _vlkernels_attention(self) -> nn.Module:
            return self.blocks[0][0] if key == IDEFICS else self.layers[0].self_attn

        def _vlkernels_latents(self) -> Tensor:
            return self.latents

    return finished(Fused, original, __name__)


def _kosmos2_class(original: type) -> type:
    """One attention without norms. Upstream also returns the attention's weights, which only its eager form has."""
    import importlib

    kinds = (importlib.import_module(original.__module__).KosmosTextAttention,)

    class Fused(_Resampler, original):
        _vlkernels_kinds, _vlkernels_acts = kinds, {}

        def forward(self, features: Tensor):
            values = self._vlkernels_stock() or self._vlkernels_values(features)
            if isinstance(values, str) or backends.choose(cross_attention, values) == "reference":
                return super().forward(features)
            dropout = self.x_attn.dropout
            attention = self._vlkernels_view(lambda: _attention(self.x_attn, "out_proj", dropout, bias=True))
            attention.training = self.training
            x, pair = self.dense(features), [(attention, None)]
            heads = queries(attention, None, self.latent_query[None], *packed_weights(pair)[0])
            media = Media(x, None, None)
            y = media.attend(attention, heads, context_sources(pair, x, 0)[0])
            return self.x_attn.out_proj(y), None

        def _vlkernels_values(self, x: Tensor) -> tuple | str:
            if self.x_attn.inner_attn_ln is not None:
                return "the attention has a norm inside"
            return super()._vlkernels_values(x)

        def _vlkernels_stock(self) -> str | None:
            """Why the attention as it is configured is upstream's own."""
            if self.x_attn.config._attn_implementation == "eager":
                return "eager attention, which returns its weights"
            if self.x_attn.is_causal:
                return "this transformers has the latents' attention causal; its later versions do not"
            return None

        def vlkernels_state(self) -> tuple[str, str]:
            reason = self._vlkernels_stock()
            return super().vlkernels_state() if reason is None else ("stock", reason)

        def _vlkernels_attention(self) -> nn.Module:
            return self.x_attn

        def _vlkernels_latents(self) -> Tensor:
            return self.latent_query

    return finished(Fused, original, __name__)


def __getattr__(name: str):
    import importlib

    for key in KEYS:
        module, _, cls = key.partition(":")
        if cls == name:
            return resampler_class(getattr(importlib.import_module(f"transformers.models.{module}"), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
