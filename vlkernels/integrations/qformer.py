"""transformers' Q-Formers (BLIP-2, InstructBLIP, InstructBlipVideo) with a fused forward.

A swapped Q-Former runs `modules.qformer` over its own children, whose names ours are, through views of our classes.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import nn

from .. import backends
from ..modules.qformer import LOWEST, QFormer
from ..modules.qformer_layer import QFormerLayer
from ..ops.cross_attention import cross_attention
from ._views import Viewed, problem, view_of
from .swap import Shown, finished, training_backend
from .transformers import _act_name, _acts

KEYS = tuple(
    f"{name}.modeling_{name}:{prefix}QFormerModel"
    for name, prefix in (
        ("blip_2", "Blip2"), ("instructblip", "InstructBlip"), ("instructblipvideo", "InstructBlipVideo"),
    )
)  # fmt: skip

_PARTS = ("Encoder", "Layer", "Attention", "MultiHeadAttention", "SelfOutput", "Intermediate", "Output", "Embeddings")


def _attention_dropout(attention: nn.Module) -> float:
    own = attention.attention
    return float(own.attention_dropout) if hasattr(own, "attention_dropout") else own.dropout.p


def _layer_view(layer: nn.Module, acts: dict) -> QFormerLayer:
    children = {"attention": layer.attention, "crossattention": getattr(layer, "crossattention", None)}
    for name in ("intermediate", "output", "intermediate_query", "output_query"):
        if hasattr(layer, name):
            children[name] = getattr(layer, name)
    return view_of(
        QFormerLayer, {name: name for name in children}, children,
        act=_act_name(layer.intermediate_query.intermediate_act_fn, acts),
        head_dim=layer.attention.attention.attention_head_size,
        hidden_dropout=layer.output_query.dropout.p, attention_dropout=_attention_dropout(layer.attention),
    )  # fmt: skip


def _view(m: nn.Module, acts: dict) -> QFormer:
    embeddings = getattr(m, "embeddings", None)
    layers = nn.ModuleList(_layer_view(layer, acts) for layer in m.encoder.layer)
    children = {"layernorm": m.layernorm if embeddings is None else embeddings.layernorm}
    children |= {"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers}), "cls": None}
    words = 0 if embeddings is None else embeddings.word_embeddings.num_embeddings
    return view_of(
        QFormer, {name: name for name in children}, children,
        hidden_size=m.config.hidden_size, encoder_hidden_size=m.config.encoder_hidden_size, vocab_size=words,
        head_dim=layers[0].head_dim, masked=LOWEST, level=0,
        max_position_embeddings=0 if embeddings is None else embeddings.position_embeddings.num_embeddings,
        hidden_dropout=(m if embeddings is None else embeddings).dropout.p,
    )  # fmt: skip


@functools.cache
def qformer_class(original: type) -> type:
    """The static subclass of a class of KEYS that swapped Q-Formers get."""
    acts = _acts()
    module = importlib.import_module(original.__module__)
    prefix = original.__name__.removesuffix("Model")
    kinds = tuple(getattr(module, prefix + part) for part in _PARTS if hasattr(module, prefix + part))
    kinds += (nn.GELU, nn.Dropout, nn.Embedding)
    with_text = hasattr(module, prefix + "Embeddings")
    output = module.BaseModelOutputWithPoolingAndCrossAttentions

    class Fused(Viewed, original, metaclass=Shown):
        def forward(self, *args, **kwargs):
            call = self._vlkernels_call(args, kwargs)
            if isinstance(call, str) or backends.choose(cross_attention, call.pop("values")) == "reference":
                return super().forward(*args, **kwargs)
            view = self._vlkernels_view(lambda: _view(self, acts))
            if view.training != self.training:
                view.train(self.training)
            hidden = view(**call).hidden
            return output(last_hidden_state=hidden, pooler_output=hidden[:, 0, :])

        def _vlkernels_call(self, args: tuple, kwargs: dict) -> dict | str:
            """Arguments of QFormer.forward, and cross_attention's for the choice, or why the call is upstream's."""
            given = dict(zip(_ARGUMENTS[with_text], args, strict=False)) | kwargs
            given = {name: value for name, value in given.items() if value is not None}
            queries, image = given.pop("query_embeds", None), given.pop("encoder_hidden_states", None)
            masks = {name: given.pop(name, None) for name in ("attention_mask", "encoder_attention_mask")}
            ids = given.pop("input_ids", None) if with_text else None
            if given.pop("query_length", None) not in (None, 0 if queries is None else queries.shape[1]):
                return "text that comes through query_embeds"
            if not given.pop("return_dict", True) or any(value is not False for value in given.values()):
                return f"called with {', '.join(given) or 'return_dict=False'}"
            if self.config.output_attentions or self.config.output_hidden_states:
                return "attentions or hidden states are to be returned"
            if queries is None or image is None:
                return "called without queries or image"
            for name, mask in masks.items():
                if mask is not None and (mask.dim() != 2 or mask.is_floating_point()):
                    return f"{name} is {mask.dtype} {tuple(mask.shape)}"
            if (reason := problem(self, kinds, acts)) is not None:
                return reason
            if self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.encoder.layer):
                return "gradient checkpointing, which each of its layers does by itself"
            # as upstream: everything in the Q-Former's own dtype
            dtype = self.encoder.layer[0].attention.attention.query.weight.dtype
            queries = queries.to(dtype)
            # expanded queries are one row; what is the same in the whole batch is computed once
            queries = queries[:1] if queries.shape[0] == image.shape[0] and queries.stride(0) == 0 else queries
            attention = self.encoder.layer[0].attention.attention
            q = torch.empty((1, queries.shape[1], attention.num_attention_heads, attention.attention_head_size))
            q = q.to(image.device, dtype)
            return {
                "query_embeds": queries, "image": image.to(dtype), "input_ids": ids,
                "attention_mask": masks["attention_mask"], "image_mask": masks["encoder_attention_mask"],
                "values": cross_attention.values(q, q, q),
            }  # fmt: skip

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            weight = self.encoder.layer[0].crossattention.attention.key.weight
            made = {"dtype": weight.dtype, "device": weight.device}
            queries = torch.empty((1, 32, self.config.hidden_size), **made)
            image = torch.empty((1, 64, weight.shape[1]), **made)
            call = self._vlkernels_call((), {"query_embeds": queries, "encoder_hidden_states": image})
            return training_backend(cross_attention, call if isinstance(call, str) else call["values"])

    return finished(Fused, original, __name__)


# upstream's positional arguments, without and with a text of its own
_ARGUMENTS = {
    False: ("query_embeds", "query_length", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
    True: (
        "input_ids", "attention_mask", "position_ids", "query_embeds", "encoder_hidden_states",
        "encoder_attention_mask",
    ),
}  # fmt: skip


def __getattr__(name: str):
    for key in KEYS:
        module, _, cls = key.partition(":")
        if cls == name:
            return qformer_class(getattr(importlib.import_module(f"transformers.models.{module}"), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
