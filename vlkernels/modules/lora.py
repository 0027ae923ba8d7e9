"""Linear layers with low-rank adapters. Hu et al., arXiv 2106.09685; peft `tuners/lora/layer.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear


class Adapter(nn.Module):
    """One low-rank branch: a (R, K), b (N, R) and, with `lora_bias`, bias (N,), which the scale multiplies too.

    scale and p (dropout in training) are hyper-parameters: plain attributes, not in the state dict.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, scale: float, p: float, bias: bool, device=None, dtype=None
    ):
        super().__init__()
        self.scale, self.p = scale, p
        self.a = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a as nn.Linear initialises its weight; b and bias zero, so that a fresh adapter changes nothing."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"r={self.a.shape[0]}, scale={self.scale:g}, p={self.p:g}, bias={self.bias is not None}"


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + Σ over active adapters of scale * (drop_p(x) Aᵀ Bᵀ + lora_bias).

    x (..., K) -> y (..., N). Parameters: `weight` (N, K), or (K, N) with `fan_in_fan_out` as in GPT-2's Conv1D; `bias`
    (N,) or None; `adapters.<name>.a` (R, K), `.b` (N, R), `.bias` (N,) or None. weight and bias start frozen; set
    `requires_grad` to train them.

    Args:
        in_features, out_features: K and N.
        r: rank R of the adapter "default", from 1 to 512 on kernels.
        alpha: scale = alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski, arXiv 2312.03732); default r.
        dropout: p in [0, 1), on the input of the low-rank branch, in training only.
        bias: the plain layer has a bias. lora_bias: the adapter has one.
        adapter_dtype: dtype of a, b and the adapter's bias; default that of the weight. float32 over a half-precision
            weight computes the branch in float32.

    dtypes: x in the weight's dtype, or any under autocast. The sum is rounded to y's dtype after each adapter.

    Raises: ValueError, TypeError naming the argument, what it got and what is accepted.
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
        fan_in_fan_out: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        # nn.Linear's own initialisation, in its order
        bound = 1 / math.sqrt(in_features) if in_features > 0 else 0.0
        nn.init.uniform_(weight, -bound, bound)
        bias_ = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if bias_ is not None:
            nn.init.uniform_(bias_, -bound, bound)
        self._start(
            weight, bias_, fan_in_fan_out, r,
            alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias, adapter_dtype=adapter_dtype,
        )  # fmt: skip

    @classmethod
    def from_plain(
        cls,
        m: nn.Module,
        r: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """The layer with adapter "default" over m's own weight and bias, which are shared, not copied, and frozen.

        m: an nn.Linear, or a transformers Conv1D, known by its class name and its 2-D weight stored (in, out).
        """
        conv1d = any(base.__name__ == "Conv1D" for base in type(m).__mro__)
        weight = getattr(m, "weight", None)
        if not (conv1d or isinstance(m, nn.Linear)) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise TypeError(f"m is a {type(m).__name__}; accepted: nn.Linear or transformers' Conv1D with a 2-D weight")
        if not weight.is_floating_point():
            raise TypeError(f"m.weight has dtype {weight.dtype}; accepted: a floating dtype, so no quantised weight")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._start(
            weight, m.bias, conv1d, r,
            alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        return layer.train(m.training)

    def _start(self, weight: nn.Parameter, bias: nn.Parameter | None, fan_in_fan_out: bool, r: int, **adapter) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = reversed(weight.shape) if fan_in_fan_out else weight.shape
        self.weight, self.bias = weight, bias
        self.adapters = nn.ModuleDict()
        self._merged: tuple[str, ...] = ()
        self._original: tuple[Tensor, Tensor | None] | None = None
        self.add_adapter("default", r, **adapter)
        self._active: tuple[str, ...] = ("default",)
        for t in (weight, bias):
            if t is not None:
                t.requires_grad_(False)

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
    ) -> None:
        """A further adapter, on the weight's device; it acts once `active` names it."""
        # a ModuleDict takes no dots and none of its own attributes' names
        if not isinstance(name, str) or not name or "." in name or hasattr(self.adapters, name):
            raise ValueError(f"adapter name is {name!r}; accepted: a new name without dots; there are {self._names()}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r is {r!r}; accepted: a rank of at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: a probability in [0, 1)")
        if adapter_dtype is not None and not adapter_dtype.is_floating_point:
            raise TypeError(f"adapter_dtype is {adapter_dtype}; accepted: a floating dtype")
        scale = (r if alpha is None else alpha) / (math.sqrt(r) if rslora else r)
        self.adapters[name] = Adapter(
            self.in_features,
            self.out_features,
            r,
            scale,
            float(dropout),
            lora_bias,
            self.weight.device,
            adapter_dtype or self.weight.dtype,
        ).train(self.training)

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter and its parameters."""
        self._adapter(name)
        self.active = tuple(n for n in self._active if n != name)
        del self.adapters[name]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act, in the order of summation. Setting it does not touch `requires_grad`."""
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self._adapter(name)
        if len(set(names)) < len(names):
            raise ValueError(f"active is {names}; accepted: each adapter once")
        if self._merged:
            raise RuntimeError(f"the adapters {', '.join(self._merged)} are merged; call unmerge() first")
        self._active = names

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters whose deltas `weight` holds now."""
        return self._merged

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self._merged or not self._active:
            return F.linear(x, weight, self.bias)
        first, *others = (self.adapters[name] for name in self._active)
        p = first.p if self.training else 0.0
        y = lora_linear(x, weight, first.a, first.b, self.bias, first.bias, scale=first.scale, p=p)
        for adapter in others:
            p = adapter.p if self.training else 0.0
            y = lora_linear(x, None, adapter.a, adapter.b, lora_bias=adapter.bias, base=y, scale=adapter.scale, p=p)
        return y

    def delta_weight(self, name: str) -> Tensor:
        """scale * B A of one adapter, in its dtype and laid out as `weight`."""
        return self._delta(name).to(self.adapters[name].a.dtype)

    def merged_weight(self) -> Tensor:
        """`weight` plus the deltas of the active adapters, rounded once; this layer stays as it is."""
        if self._merged:
            return self.weight.clone()
        return self._weight_plus(self._active, 1).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self, keep: bool = False) -> None:
        """Add the active adapters into `weight` and `bias` in place; forward is then the plain layer.

        Parameters shared with a plain module change there too, and a state dict taken now holds the merged weight.
        keep: hold a copy of weight and bias, so that `unmerge` restores them bit for bit.
        """
        if self._merged:
            raise RuntimeError(f"the adapters {', '.join(self._merged)} are merged already; call unmerge() first")
        weight, bias = self._weight_plus(self._active, 1), self._bias_plus(self._active, 1)
        if keep and self._active:
            self._original = self.weight.clone(), None if self.bias is None else self.bias.clone()
        self._assign(weight, bias)
        self._merged = self._active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: exact after merge(keep=True), else by subtracting, to within the weight's rounding.

        Subtraction takes the adapters as they are now: do not train or load them while merged.
        """
        if not self._merged:
            raise RuntimeError("no adapter is merged; call merge() first")
        if self._original is None:
            self._assign(self._weight_plus(self._merged, -1), self._bias_plus(self._merged, -1))
        else:
            self._assign(*self._original)
        self._merged, self._original = (), None

    def _weight_plus(self, names: tuple[str, ...], sign: int) -> Tensor:
        return sum((sign * self._delta(name) for name in names), _wide(self.weight))

    def _bias_plus(self, names: tuple[str, ...], sign: int) -> Tensor | None:
        with_bias = [name for name in names if self.adapters[name].bias is not None]
        if self.bias is None:
            if with_bias:
                raise RuntimeError(f"adapter {with_bias[0]!r} has a bias and this layer has none to merge it into")
            return None
        return sum((sign * self.adapters[n].scale * self.adapters[n].bias for n in with_bias), _wide(self.bias))

    def _assign(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def _delta(self, name: str) -> Tensor:
        adapter = self._adapter(name)
        with torch.autocast(adapter.a.device.type, enabled=False):
            delta = adapter.scale * (_wide(adapter.b) @ _wide(adapter.a))
        return delta.t() if self.fan_in_fan_out else delta

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r}; there are {self._names()}")
        return self.adapters[name]

    def _names(self) -> str:
        return ", ".join(self.adapters) or "none"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"fan_in_fan_out={self.fan_in_fan_out}, active={self._active}"
            + (f", merged={self._merged}" if self._merged else "")
        )


def _wide(t: Tensor) -> Tensor:
    """t in float32 at least: a merged weight is rounded once."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
