"""Embeddings with low-rank adapters, plain and DoRA. Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353; peft
`tuners/lora/layer.py`, class Embedding, and `tuners/lora/dora.py`, class DoraEmbeddingLayer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dora_linear.norm import row_norm
from .dora import DoRALinear
from .lora import LoRALinear, _wide


class LoRAEmbedding(LoRALinear):
    """y = E[ids] + Σ over active adapters of scale * (A[:, ids])ᵀ Bᵀ, times `embed_scale` where the base has one.

    ids (...) of integers below V -> y (..., D). It is a LoRALinear over one-hot rows: `weight` E (V, D), laid out
    (in, out); `adapters.<name>.a` A (R, V), `.b` B (D, R), with the scale of LoRALinear; `active`, `merge`, `unmerge`,
    `delta_weight` and `merged_weight` are the ones inherited. The weight starts frozen.

    Nothing is fused: a product with a one-hot row is a lookup, so a token moves one row of E (D numbers), one column of
    A (R numbers) and the result. Only the R x D product computes, and it runs once per forward, not once per layer.

    Args:
        num_embeddings, embedding_dim: V and D.
        r, alpha, rslora, adapter_dtype: as in LoRALinear. There is neither dropout nor an adapter bias.
        padding_idx, max_norm, norm_type, scale_grad_by_freq: of F.embedding. As in peft they hold for both lookups: row
            padding_idx of E and column padding_idx of A get no gradient, and max_norm shortens the rows of E and the
            columns of A that were looked up, in place. Gradients are dense: peft's backward fails on a sparse one.

    dtypes: the sum is taken in the wider of E's and the adapters' dtype and rounded once, to E's.

    Raises: ValueError, TypeError naming the argument, what it got and what is accepted.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        # nn.Embedding's own initialisation and its checks of padding_idx
        plain = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._from_plain(plain, r, alpha=alpha, rslora=rslora, adapter_dtype=adapter_dtype)

    @classmethod
    def from_plain(
        cls,
        m: nn.Embedding,
        r: int,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAEmbedding:
        """The layer with adapter "default" over m's own weight, which is shared, not copied, and frozen.

        m: an nn.Embedding, or a subclass that only multiplies the result by its scalar `embed_scale` (Gemma 3).
        """
        if type(m) is not nn.Embedding and not (isinstance(m, nn.Embedding) and hasattr(m, "embed_scale")):
            raise TypeError(f"m is a {type(m).__name__}; accepted: nn.Embedding, or one with a scalar embed_scale")
        if not m.weight.is_floating_point():
            raise TypeError(f"m.weight has dtype {m.weight.dtype}; accepted: a floating dtype, so no quantised weight")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._from_plain(m, r, alpha=alpha, rslora=rslora, adapter_dtype=adapter_dtype)
        return layer.train(m.training)

    def _from_plain(self, m: nn.Embedding, r: int, **adapter) -> None:
        self.padding_idx, self.max_norm, self.norm_type = m.padding_idx, m.max_norm, m.norm_type
        self.scale_grad_by_freq = m.scale_grad_by_freq
        scale = getattr(m, "embed_scale", None)
        if scale is not None:
            scale = torch.as_tensor(scale, device=m.weight.device).detach().clone()
            if scale.numel() != 1:
                raise TypeError(f"m.embed_scale has shape {tuple(scale.shape)}; accepted: a scalar")
        self.register_buffer("embed_scale", scale, persistent=False)
        self._start(m.weight, None, True, r, **adapter)

    def add_adapter(
        self,
        name: str,
        r: int,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """A further adapter, on the weight's device; it acts once `active` names it. a is zero, b normal, as peft's."""
        super().add_adapter(name, r, alpha=alpha, rslora=rslora, adapter_dtype=adapter_dtype)
        nn.init.zeros_(self.adapters[name].a)
        nn.init.normal_(self.adapters[name].b)

    def forward(self, ids: Tensor) -> Tensor:
        y = self._scaled(self._rows(ids, self.weight))
        if not self._merged:
            for name in self._active:
                adapter = self.adapters[name]
                # y + scale * (A[:, ids])ᵀ Bᵀ
                y = y + self._scaled(adapter.scale * F.linear(self._rows(ids, adapter.a.t()), adapter.b))
                y = self._gained(y, name)
        return y.to(self.weight.dtype)

    def _gained(self, y: Tensor, name: str) -> Tensor:
        """The output so far after an adapter; DoRA scales it."""
        return y

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def _scaled(self, y: Tensor) -> Tensor:
        """y times the base's embed_scale, which each term rounds to its own dtype, as upstream does."""
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, padding_idx={self.padding_idx}, active={self._active}" + (
            f", merged={self._merged}" if self._merged else ""
        )


class DoRAEmbedding(LoRAEmbedding, DoRALinear):
    """y = g * (E[ids] + scale * (A[:, ids])ᵀ Bᵀ), g = magnitude / ‖E + scale (B A)ᵀ‖ by column of E, for one adapter.

    Several active adapters act in turn, each on the output so far, so their order matters; one added with dora=False
    only adds its term. Parameters: those of LoRAEmbedding, and `adapters.<name>.magnitude` (D,), which starts as the
    norm, so that a fresh adapter changes nothing. The norm is a constant in backward.

    The norm is over all V rows, so each forward reads E once; inside `vlkernels.modules.dora.cached_norms` it is kept.
    """

    def add_adapter(self, name: str, r: int, *, dora: bool = True, **options) -> None:
        """A further adapter; it acts once `active` names it. dora=False: a plain LoRA adapter without magnitude."""
        super().add_adapter(name, r, **options)
        if not dora:
            del self.adapters[name].magnitude

    def _gained(self, y: Tensor, name: str) -> Tensor:
        adapter = self.adapters[name]
        if getattr(adapter, "magnitude", None) is None:
            return y
        norm = self._norm(name)
        if norm is None:
            norm = row_norm(self.weight.t(), adapter.a, adapter.b, adapter.scale)
        return y * (_wide(adapter.magnitude) / norm)
