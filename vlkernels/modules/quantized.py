"""Linear layers with a frozen 4-bit weight and low-rank adapters. QLoRA: Dettmers et al., arXiv 2305.14314."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _nf4
from ..ops._scratch import release_scratch, scratch_limit
from ..ops.lora_linear import lora_linear
from . import _quant_state
from .lora import LoRALinear

__all__ = ["QLoRALinear", "release_scratch", "scratch_limit"]


class QLoRALinear(LoRALinear):
    """y = x dequantise(W)ᵀ + bias + Σ over active adapters of scale * (drop_p(x) Aᵀ Bᵀ + lora_bias).

    x (..., K) -> y (..., N). Buffers: `weight` (ceil(N K / 2), 1) uint8, the packed codes, and `quant`, code book and
    absmax (layout in `ops/_nf4.py`). Parameters: `bias` (N,) or None, frozen; `adapters.<name>.a` (R, K), `.b` (N, R),
    `.bias` (N,) or None. The weight gets no gradient; x's gradient uses the dequantised weight, rounded to the dtype
    that was quantised and cast to that of the product.

    The state dict is the one that bitsandbytes' Linear4bit writes, key by key and byte by byte, with the adapters
    beside it; one of bitsandbytes loads, whatever its quant_type, blocksize and double quantisation.

    Args:
        in_features, out_features: K and N.
        r, alpha, dropout, rslora, bias, lora_bias: as in LoRALinear.
        quant_type: "nf4" or "fp4". blocksize: 32, 64, 128, ... 4096 elements for one absmax.
        double: quantise the absmax too, to 8 bits in blocks of 256.
        adapter_dtype: of a, b and the adapter's bias; default `dtype`.
        dtype: float32, bfloat16 or float16, what is quantised and what bias has.

    dtypes: x in the bias's dtype, or any under autocast.

    Raises: ValueError, TypeError naming the argument, what it got and what is accepted; RuntimeError for a state dict
        that is corrupt or of another kind.
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
        lora_bias: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double: bool = True,
        adapter_dtype: torch.dtype | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        plain = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._quantised(
            plain, r, quant_type, blocksize, double,
            alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias, adapter_dtype=adapter_dtype,
        )  # fmt: skip

    @classmethod
    def from_plain(
        cls,
        m: nn.Linear,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> QLoRALinear:
        """The layer with adapter "default" over m's weight, quantised, and over m's own bias, shared and frozen."""
        weight = getattr(m, "weight", None)
        if not isinstance(m, nn.Linear) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise TypeError(f"m is a {type(m).__name__}; accepted: nn.Linear with a floating weight")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._quantised(
            m, r, quant_type, blocksize, double,
            alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        return layer.train(m.training)

    def _quantised(self, m: nn.Linear, r: int, quant_type: str, blocksize: int, double: bool, **adapter) -> None:
        packed, quant = _nf4.quantize(m.weight, quant_type, blocksize, double)
        self.out_features, self.in_features = m.weight.shape
        self.fan_in_fan_out = False
        self._facts = _quant_state.Facts((self.out_features, self.in_features), quant_type, blocksize, m.weight.dtype)
        self.register_buffer("weight", packed)
        # what it holds stands in the state dict under bitsandbytes' names
        self.register_buffer("quant", quant, persistent=False)
        self.bias = m.bias
        if m.bias is not None:
            m.bias.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self._merged, self._original = (), None
        self.add_adapter("default", r, **adapter)
        self._active: tuple[str, ...] = ("default",)

    def add_adapter(self, name: str, r: int, *, adapter_dtype: torch.dtype | None = None, **options) -> None:
        """As LoRALinear's; adapter_dtype: default the dtype that was quantised."""
        super().add_adapter(name, r, adapter_dtype=adapter_dtype or self.quant_dtype, **options)

    @property
    def quant_type(self) -> str:
        """ "nf4" or "fp4"."""
        return self._facts.quant_type

    @property
    def blocksize(self) -> int:
        """Elements for one absmax."""
        return self._facts.blocksize

    @property
    def quant_dtype(self) -> torch.dtype:
        """The dtype that was quantised."""
        return self._facts.dtype

    @property
    def double(self) -> bool:
        """Whether the absmax is quantised too."""
        return _nf4.is_double(self.quant, _nf4.block_count(self._facts.shape, self.blocksize))

    def forward(self, x: Tensor) -> Tensor:
        if not self._active:
            return F.linear(x, self.dense_weight().to(x.dtype), self.bias)
        first, *others = (self.adapters[name] for name in self._active)
        p = first.p if self.training else 0.0
        y = lora_linear(
            x, self.weight, first.a, first.b, self.bias, first.bias, quant=self.quant, scale=first.scale, p=p,
            blocksize=self.blocksize, quant_dtype=self.quant_dtype,
        )  # fmt: skip
        for adapter in others:
            p = adapter.p if self.training else 0.0
            y = lora_linear(x, None, adapter.a, adapter.b, lora_bias=adapter.bias, base=y, scale=adapter.scale, p=p)
        return y

    def dense_weight(self) -> Tensor:
        """The dequantised weight (N, K), in the dtype that was quantised."""
        return _nf4.dequantize(self.weight, self.quant, self._facts.shape, self.blocksize, dtype=self.quant_dtype)

    def merged_weight(self) -> Tensor:
        """`dense_weight` plus the deltas of the active adapters, rounded once."""
        wide = self.dense_weight().to(torch.promote_types(self.quant_dtype, torch.float32))
        return sum((self._delta(name) for name in self._active), wide).to(self.quant_dtype)

    def merge(self, keep: bool = False) -> None:
        """Refused: 4 bits cannot hold the adapters without rounding them away. `merged_weight` gives a dense weight."""
        raise RuntimeError("a 4-bit weight cannot hold the adapters; merged_weight() gives the sum as a dense weight")

    def unmerge(self) -> None:
        """Refused, as `merge` is."""
        raise RuntimeError("no adapter is merged; a 4-bit weight never holds one")

    # -- state dict --------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in _quant_state.write(self.quant, self._facts).items():
            destination[f"{prefix}weight.{name}"] = value

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected, errors) -> None:
        weight = f"{prefix}weight."
        parts = {key.removeprefix(weight): value for key, value in state_dict.items() if key.startswith(weight)}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(weight)}
        if f"{prefix}weight" in rest or parts:
            try:
                rest[f"{prefix}weight"], quant = self._read(rest, prefix, parts)
                self.quant = quant.to(self.quant.device if not self.quant.is_meta else quant.device)
            except ValueError as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                # named already; it is neither missing nor to be copied
                rest[f"{prefix}weight"] = self.weight
        elif strict:
            missing_keys += [weight + name for name in _quant_state.write(self.quant, self._facts)]
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing_keys, unexpected, errors)

    def _read(self, state_dict: Mapping[str, Tensor], prefix: str, parts: dict) -> tuple[Tensor, Tensor]:
        if f"{prefix}weight" not in state_dict:
            raise ValueError("weight is missing")
        if not parts:
            raise ValueError("weight has no quant state beside it; from_plain() quantises a plain weight")
        packed, quant, facts = _quant_state.read(state_dict[f"{prefix}weight"], parts)
        if facts.shape != self._facts.shape:
            raise ValueError(f"the weight is {facts.shape}, the layer's is {self._facts.shape}")
        self._facts = facts
        return packed, quant

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, blocksize={self.blocksize}, double={self.double}, active={self._active}"
        )
