"""transformers' gated cross-attention layers (Idefics, Mllama) with a fused forward.

A swapped layer runs `modules.gated` over its own children. The masks that transformers hands it are read as they are,
in the kernel: dense ones of keys, for a layer does not know how many tokens an image has.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor, nn

from .. import backends
from ..modules.gated import idefics_layer, mllama_layer
from ..modules.gated_layers import GatedAttention
from ..modules.gated_media import MediaContext, MediaMask
from ..ops.media_cross_attention import media_cross_attention
from ._views import Viewed, problem
from .resamplers import _rms_view
from .swap import Shown, class_key, finished, training_backend
from .transformers import _act_name, _acts

IDEFICS = "idefics.modeling_idefics:IdeficsGatedCrossAttentionLayer"
MLLAMA = "mllama.modeling_mllama:MllamaCrossAttentionDecoderLayer"
KEYS = (IDEFICS, MLLAMA)

_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
_NORMS = {IDEFICS: ("q_layer_norm", "k_layer_norm"), MLLAMA: ("q_norm", "k_norm")}


class _Attention(GatedAttention):
    """The attention's children by their roles."""

    def __init__(self, attention: nn.Module, norms: tuple[str, str]):
        self.parts = {role: getattr(attention, name) for role, name in _PARTS.items()}
        if hasattr(attention, norms[0]):
            self.parts |= {
                r: _rms_view(getattr(attention, n)) for r, n in zip(("q_norm", "k_norm"), norms, strict=True)
            }
        self.head_dim, self.dropout, self.training = attention.head_dim, attention.dropout, attention.training

    def part(self, role: str) -> nn.Module | None:
        return self.parts.get(role)


class _View:
    """A layer as modules.gated reads one: its children, with norms of torch's class, and its gates."""

    def __init__(self, layer: nn.Module, norms: tuple[str, str]):
        self.attention, self.mlp = _Attention(layer.cross_attn, norms), layer.mlp
        self.input_layernorm = _rms_view(layer.input_layernorm)
        self.post_attention_layernorm = _rms_view(layer.post_attention_layernorm)
        for name, gate in layer._parameters.items():
            setattr(self, name, gate)


class _Gated(Viewed):
    """Beside a gated layer of transformers in its swapped class."""

    def _vlkernels_values(self, x: Tensor, media: Tensor) -> tuple | str:
        """Arguments of one media_cross_attention of the layer, or why this call is upstream's own."""
        if (reason := problem(self, self._vlkernels_kinds, self._vlkernels_acts)) is not None:
            return reason
        a = self.cross_attn
        if x.dim() != 3 or media.dim() != 3:
            return f"inputs of shapes {tuple(x.shape)} and {tuple(media.shape)}"
        if not torch.is_autocast_enabled(x.device.type):
            for name, t in (("x", x), ("media", media)):
                if t.dtype != a.q_proj.weight.dtype:
                    return f"{name} is {t.dtype} over {a.q_proj.weight.dtype} weights without autocast"
        heads, groups = (linear.weight.shape[0] // a.head_dim for linear in (a.q_proj, a.k_proj))
        made = {"dtype": x.dtype, "device": x.device}
        q = torch.empty((x.shape[0], x.shape[1], heads, a.head_dim), **made)
        k = torch.empty((x.shape[0], media.shape[1], groups, a.head_dim), **made)
        return media_cross_attention.values(q, k, k)

    def vlkernels_state(self) -> tuple[str, str]:
        """(backend, reason) for a training step in this layer's present state."""
        weights = (self.cross_attn.q_proj.weight, self.cross_attn.k_proj.weight)
        x, media = (torch.empty((1, 64, w.shape[1]), dtype=w.dtype, device=w.device) for w in weights)
        return training_backend(media_cross_attention, self._vlkernels_values(x, media))

    def _vlkernels_parts(self) -> tuple[_View, str]:
        view = self._vlkernels_view(lambda: _View(self, self._vlkernels_norms))
        view.attention.training = self.cross_attn.training
        return view, _act_name(self.mlp.act_fn, self._vlkernels_acts)


def _runs_stock(values: tuple | str) -> bool:
    return isinstance(values, str) or backends.choose(media_cross_attention, values) == "reference"


@functools.cache
def gated_class(original: type) -> type:
    """The static subclass of a class of KEYS that swapped layers get."""
    key = class_key(original).removeprefix("transformers.models.")
    module = importlib.import_module(original.__module__)
    names = {
        IDEFICS: ("IdeficsAttention", "IdeficsMLP", "IdeficsRMSNorm", "IdeficsRotaryEmbedding"),
        MLLAMA: ("MllamaTextCrossAttention", "MllamaTextMLP", "MllamaTextRMSNorm"),
    }[key]
    kinds = tuple(getattr(module, name) for name in names)
    return (_idefics_class if key == IDEFICS else _mllama_class)(original, kinds, {**_acts(), nn.GELU: "gelu"})


def _idefics_class(original: type, kinds: tuple, acts: dict) -> type:
    class Fused(_Gated, original, metaclass=Shown):
        _vlkernels_kinds, _vlkernels_acts, _vlkernels_norms = (*kinds, nn.Tanh), acts, _NORMS[IDEFICS]

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            image_hidden_states: Tensor | None = None,
            image_attention_mask: Tensor | None = None,
            cross_attention_gate: Tensor | None = None,
            past_key_values=None,
            **kwargs,
        ):
            given = image_hidden_states is not None and cross_attention_gate is not None and past_key_values is None
            values = "upstream's own error" if not given else self._vlkernels_values(hidden_states, image_hidden_states)
            if not isinstance(values, str) and not _is_dense(image_attention_mask):
                # without a mask upstream's attention is causal
                values = "no additive mask of four dimensions"
            if _runs_stock(values):
                return super().forward(
                    hidden_states, attention_mask, image_hidden_states, image_attention_mask, cross_attention_gate,
                    past_key_values, **kwargs,
                )  # fmt: skip
            view, act = self._vlkernels_parts()
            mask = image_attention_mask.expand(hidden_states.shape[0], -1, -1, -1)
            gate = _closing(mask, cross_attention_gate, image_hidden_states.shape[1])
            context = MediaContext.of([view], image_hidden_states, gate)
            return idefics_layer(view, hidden_states, context, act, 0, self.config if self.training else 0.0)

    return finished(Fused, original, __name__)


def _closing(mask: Tensor, gate: Tensor, keys: int) -> MediaMask:
    """Rows whose gate is 0 have an empty span, and tiles of them are skipped; the others have one of all keys."""
    end = (gate != 0).to(torch.int32) * keys
    return MediaMask(torch.stack((torch.zeros_like(end), end), -1), mask[:, 0])


def _is_dense(mask: Tensor | None) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and mask.is_floating_point()


def _mllama_class(original: type, kinds: tuple, acts: dict) -> type:
    class Fused(_Gated, original, metaclass=Shown):
        _vlkernels_kinds, _vlkernels_acts, _vlkernels_norms = kinds, acts, _NORMS[MLLAMA]

        def forward(
            self,
            hidden_states: Tensor,
            cross_attention_states: Tensor | None = None,
            cross_attention_mask: Tensor | None = None,
            attention_mask: Tensor | None = None,
            full_text_row_masked_out_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values=None,
            use_cache: bool | None = False,
            position_embeddings=None,
            **kwargs,
        ):
            if cross_attention_states is None or past_key_values is not None:
                values = "keys and values go through the cache"
            else:
                values = self._vlkernels_values(hidden_states, cross_attention_states)
            if not isinstance(values, str) and not (cross_attention_mask is None or _is_dense(cross_attention_mask)):
                values = "no additive mask of four dimensions"
            if _runs_stock(values):
                return super().forward(
                    hidden_states, cross_attention_states, cross_attention_mask, attention_mask,
                    full_text_row_masked_out_mask, position_ids, past_key_values, use_cache, position_embeddings,
                    **kwargs,
                )  # fmt: skip
            view, act = self._vlkernels_parts()
            rows = full_text_row_masked_out_mask
            seen = None if cross_attention_mask is None else cross_attention_mask.expand(len(hidden_states), -1, -1, -1)
            mask = MediaMask(None, None if seen is None else seen[:, 0], 1, None if rows is None else rows[:, 0, :, 0])
            context = MediaContext.of([view], cross_attention_states, mask)
            return mllama_layer(view, hidden_states, context, act, 0)

    return finished(Fused, original, __name__)


def __getattr__(name: str):
    for key in KEYS:
        module, _, cls = key.partition(":")
        if cls == name:
            return gated_class(getattr(importlib.import_module(f"transformers.models.{module}"), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
