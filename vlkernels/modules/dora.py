"""Linear layers with DoRA adapters. Liu et al., arXiv 2402.09353; peft `tuners/lora/dora.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.dora_linear import dora_linear
from ..ops.dora_linear.norm import row_norm
from ..ops.lora_linear import lora_linear
from .lora import LoRALinear, _wide

_keeping = False


@contextlib.contextmanager
def cached_norms() -> Iterator[None]:
    """Inside, DoRALinear computes the norm of an adapter once for all forwards without gradients: decoding reads W once
    a token, not twice.

    For evaluation, as peft's DoraCaching is. The norm is computed again after every change that torch counts or that
    replaces a tensor: in-place operations, optimizers, load_state_dict, `.data = ...`, merge and unmerge. What is
    written past torch, `w.data.mul_(2)` or into w's memory, it cannot see; do neither inside. Outside of this nothing
    is kept, and every forward computes the norm.
    """
    global _keeping
    previous, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = previous


class NormCache:
    """The norm of one adapter while it is certain that it holds, for the tensors and the scale it was computed from.

    Copies and pickles are empty: it is no state.
    """

    def __init__(self):
        self._norm: Tensor | None = None
        self._key: tuple = ()
        self._storages: tuple[StorageWeakRef, ...] = ()

    def drop(self) -> None:
        self.__init__()

    def get(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor | None:
        """The norm, or None where none may be kept: the op computes its own then."""
        if torch.compiler.is_compiling():
            return None
        if not _keeping or torch.is_grad_enabled() or any(t.is_inference() for t in (weight, a, b)):
            self.drop()
            return None
        key = (scale, *(_state(t) for t in (weight, a, b)))
        # an expired reference keeps its address taken, so an equal address is the same memory
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in (weight, a, b))
        same = [s.cdata for s in storages] == [s.cdata for s in self._storages]
        if self._norm is None or key != self._key or not same:
            self._norm, self._key, self._storages = row_norm(weight, a, b, scale), key, storages
        return self._norm

    def __reduce__(self):
        return NormCache, ()


def _state(t: Tensor) -> tuple:
    return t._version, t.data_ptr(), t.dtype, t.device, tuple(t.shape), t.stride()


class DoRALinear(LoRALinear):
    """y = g * (x Wᵀ + scale * drop_p(x) Aᵀ Bᵀ) + bias, g = magnitude / ‖W + scale B A‖ by output row, for one adapter.

    With dropout the product with W that g - 1 scales is that of drop_p(x), as in dora_linear. Several active adapters
    act in turn, as in peft: each takes the output so far, less bias, in place of x Wᵀ (with dropout the output so far
    plus (g - 1) drop_p(x) Wᵀ), so their order matters; an adapter with dora=False adds its low-rank term.

    x (..., K) -> y (..., N). Parameters: those of LoRALinear, and `adapters.<name>.magnitude` (N,), which starts as the
    norm, so that a fresh adapter changes nothing. The norm is a constant in backward. There is no adapter bias.

    Args: those of LoRALinear but lora_bias.
        level: 0 keeps (T, N) numbers for backward besides x, 1 only (T, R), for one product with W more.

    Merging multiplies by g in turn: W_k = g_k (W_{k-1} + scale B A), every g_k with the norm over the W of before.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        bias: bool = True,
        fan_in_fan_out: bool = False,
        adapter_dtype: torch.dtype | None = None,
        level: int = 0,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, r,
            alpha=alpha, dropout=dropout, rslora=rslora, bias=bias, fan_in_fan_out=fan_in_fan_out,
            adapter_dtype=adapter_dtype, device=device, dtype=dtype,
        )  # fmt: skip
        self.level = level

    def _start(self, *args, **adapter) -> None:
        self.level = 0
        self._caches: dict[str, NormCache] = {}
        self._merged_norms: dict[str, Tensor] = {}
        super()._start(*args, **adapter)

    def add_adapter(
        self,
        name: str,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
        dora: bool = True,
    ) -> None:
        """A further adapter; it acts once `active` names it. dora=False: a plain LoRA adapter without magnitude."""
        if lora_bias:
            raise ValueError("lora_bias is True; accepted: False, DoRA has no adapter bias")
        if dora and self._merged:
            raise RuntimeError(f"the adapters {', '.join(self._merged)} are merged; call unmerge() first")
        super().add_adapter(name, r, alpha=alpha, dropout=dropout, rslora=rslora, adapter_dtype=adapter_dtype)
        if dora:
            adapter = self.adapters[name]
            norm = row_norm(self._rows_of_weight(), adapter.a, adapter.b, adapter.scale)
            adapter.magnitude = nn.Parameter(norm.to(adapter.a.dtype))

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        self._caches.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._rows_of_weight()
        if self._merged or not self._active:
            self._caches.clear()
            return F.linear(x, weight, self.bias)
        y = None
        for name in self._active:
            adapter = self.adapters[name]
            p = adapter.p if self.training else 0.0
            if not _is_dora(adapter):
                bias, w = (self.bias, weight) if y is None else (None, None)
                y = lora_linear(x, w, adapter.a, adapter.b, bias, base=y, scale=adapter.scale, p=p)
            elif y is None:
                y = dora_linear(
                    x, weight, adapter.a, adapter.b, adapter.magnitude, self._norm(name), self.bias,
                    scale=adapter.scale, p=p, level=self.level,
                )  # fmt: skip
            else:
                y = self._further(x, weight, name, p, y)
        return y

    def _further(self, x: Tensor, weight: Tensor, name: str, p: float, y: Tensor) -> Tensor:
        """y + (g - 1) * u + g * scale * z Aᵀ Bᵀ with z = drop_p(x) and u = z Wᵀ, or y less bias without dropout.

        Plain PyTorch: a second DoRA adapter on a layer is for merging, not for training at speed.
        """
        adapter = self.adapters[name]
        norm = self._norm(name)
        if norm is None:
            norm = row_norm(weight, adapter.a, adapter.b, adapter.scale)
        g = _wide(adapter.magnitude) / norm
        z = F.dropout(x.to(adapter.a.dtype), p)
        if p:
            u = F.linear(z.to(weight.dtype), weight)
        else:
            u = y if self.bias is None else y - self.bias
        low = F.linear(F.linear(z, adapter.a), adapter.b)
        return (y + (g - 1) * u + g * adapter.scale * low).to(y.dtype)

    def _norm(self, name: str) -> Tensor | None:
        if torch.compiler.is_compiling():
            return None
        adapter = self.adapters[name]
        cache = self._caches.setdefault(name, NormCache())
        return cache.get(self._rows_of_weight(), adapter.a, adapter.b, adapter.scale)

    def _rows_of_weight(self) -> Tensor:
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _gain(self, name: str, norm: Tensor) -> Tensor:
        """g as a factor of the weight, laid out as it is."""
        g = _wide(self.adapters[name].magnitude) / norm
        return g[None, :] if self.fan_in_fan_out else g[:, None]

    def _weight_plus(self, names: tuple[str, ...], sign: int) -> Tensor:
        """Merged (sign 1) with the norms over the present weight, or unmerged (-1) with the norms of then."""
        merged = _wide(self.weight)
        for name in names if sign > 0 else reversed(names):
            adapter = self.adapters[name]
            if not _is_dora(adapter):
                merged = merged + sign * self._delta(name)
            elif sign > 0:
                norm = row_norm(self._rows_of_weight(), adapter.a, adapter.b, adapter.scale)
                merged = self._gain(name, norm) * (merged + self._delta(name))
            else:
                norm = self._merged_norms[name].to(merged.device)
                merged = merged / self._gain(name, norm) - self._delta(name)
        return merged

    @torch.no_grad()
    def merge(self, keep: bool = False) -> None:
        adapters = [(name, self.adapters[name]) for name in self._active if _is_dora(self.adapters[name])]
        if not self._merged:
            weight = self._rows_of_weight()
            self._merged_norms = {name: row_norm(weight, d.a, d.b, d.scale) for name, d in adapters}
        super().merge(keep)

    @torch.no_grad()
    def unmerge(self) -> None:
        super().unmerge()
        self._merged_norms = {}

    merge.__doc__, unmerge.__doc__ = LoRALinear.merge.__doc__, LoRALinear.unmerge.__doc__


def _is_dora(adapter: nn.Module) -> bool:
    return getattr(adapter, "magnitude", None) is not None
