"""A LoRA linear whose frozen weight and B share one buffer, so that one product computes both terms. Opt-in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _packed_storage
from .lora import LoRALinear

FIRST = "default"


class PackedLoRALinear(LoRALinear):
    """LoRALinear with weight (N, K) and the adapter's b (N, R) as columns of one buffer [W, B] (N, K + R).

        y = [x, scale s] [W, B]ᵀ + bias + scale * lora_bias,   s = drop(x) Aᵀ

    For people who own their model: the product with K + R columns replaces a product and a pass over y. Parameters,
    their names, `add_adapter`, `merge` and the rest are those of LoRALinear; `weight` and `adapters.default.b` are
    views of the buffer, so optimizer steps on them, trained or not, are what the product reads. Only the adapter
    "default", first among the active ones, is computed this way; kernels do it, the reference backend and few rows
    without gradients compute as LoRALinear does.

    State dicts hold plain contiguous tensors; loading copies into the views (`assign=True` packs anew), and so do
    `.to`, `deepcopy` and pickling. What replaces parameters one by one takes the buffer apart: FSDP2 and other
    DTensor shards are refused, for anything else forward says so and `repack` mends it.

    torch's fused optimizers refuse such views on CUDA ("must have same dtype, device, and layout"); foreach and plain
    ones take them.

    Args: those of LoRALinear without `fan_in_fan_out` and `adapter_dtype`: b has the weight's dtype.

    x (..., K) -> y (..., N). dtypes: x in the weight's dtype, or any under autocast, which casts the whole buffer.

    Raises: ValueError, TypeError, RuntimeError naming what it got and what is accepted.
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
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, r,
            alpha=alpha, dropout=dropout, rslora=rslora, bias=bias, lora_bias=lora_bias, device=device, dtype=dtype,
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
    ) -> PackedLoRALinear:
        """The layer over an nn.Linear's weight and bias. Both Parameters are m's own; the weight's numbers move into
        the buffer, of which m.weight is a view from then on."""
        if not isinstance(m, nn.Linear):
            raise TypeError(f"m is a {type(m).__name__}; accepted: nn.Linear, whose weight is stored (out, in)")
        return super().from_plain(m, r, alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias)

    @classmethod
    def from_lora(cls, m: LoRALinear) -> PackedLoRALinear:
        """The layer over a LoRALinear's own Parameters and adapters; m must not be used beside it."""
        if not isinstance(m, LoRALinear) or not isinstance(m.weight, nn.Parameter) or m.weight.dim() != 2:
            raise TypeError(f"m is a {type(m).__name__}; accepted: LoRALinear")
        if m.fan_in_fan_out:
            raise ValueError("m has fan_in_fan_out=True; accepted: a weight stored (out, in), as B is")
        if FIRST not in m.adapters:
            raise ValueError(f"m has the adapters {list(m.adapters)}; accepted: one named {FIRST!r}, which is packed")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update({k: v for k, v in vars(m).items() if k not in vars(layer)})
        layer.fan_in_fan_out, layer.training = False, m.training
        layer.weight, layer.bias, layer.adapters = m.weight, m.bias, m.adapters
        layer.register_load_state_dict_post_hook(_repack)
        layer.repack()
        return layer

    def _start(self, *args, **adapter) -> None:
        super()._start(*args, **adapter)
        self.register_load_state_dict_post_hook(_repack)

    def add_adapter(self, name: str, r: int, **options) -> None:
        """As LoRALinear's; one named "default" takes its place beside the weight, in the weight's dtype."""
        if name == FIRST and options.get("adapter_dtype") not in (None, self.weight.dtype):
            raise TypeError(f"adapter_dtype is {options['adapter_dtype']}; accepted for {FIRST!r}: {self.weight.dtype}")
        super().add_adapter(name, r, **options)
        if name == FIRST:
            self.repack()

    @torch.no_grad()
    def repack(self) -> None:
        """Make weight and adapters.default.b views of one new buffer, where they are not already."""
        if FIRST not in self.adapters:
            return
        weight, b = self.weight, self.adapters[FIRST].b
        _refuse_shards(weight, b)
        if weight.dtype != b.dtype or weight.device != b.device:
            raise TypeError(
                f"adapters.{FIRST}.b is {b.dtype} on {b.device}, weight {weight.dtype} on {weight.device}; "
                "accepted: one dtype and one device, for they share a buffer"
            )
        if _packed_storage.packed(weight, b) is None:
            weight.data, b.data = _packed_storage.pack(weight, b)

    def x_buffer(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised (rows, K) for the layer before to write x into: its rows have R spare columns.

        A forward on it, or on a slice of its rows, puts scale * s there in place of copying x. Several layers of the
        same K and R may take the same x one after the other. dtype: default the weight's. Not inside a compiled graph.
        """
        rank = self.adapters[FIRST].b.shape[1]
        return _packed_storage.x_buffer(rows, self.in_features, rank, dtype or self.weight.dtype, self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        # storages are not traced: a compiled graph sees them when its kernels run, and if apart computes as LoRALinear
        if not torch.compiler.is_compiling() and FIRST in self.adapters:
            weight, b = self.weight, self.adapters[FIRST].b
            _refuse_shards(weight, b)
            if _packed_storage.packed(weight, b) is None:
                raise RuntimeError(
                    f"weight and adapters.{FIRST}.b are no longer views of one buffer: something replaced them "
                    "(FSDP2, `.data`, an assignment, a conversion of one of them). Call repack(), or use LoRALinear "
                    "where parameters are sharded"
                )
        return super().forward(x)

    def state_dict(self, *args, keep_vars: bool = False, **kwargs):
        found = super().state_dict(*args, keep_vars=keep_vars, **kwargs)
        if not keep_vars:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for name in (f"{prefix}weight", f"{prefix}adapters.{FIRST}.b"):
                if name in found:
                    found[name] = found[name].contiguous()
        return found

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __setstate__(self, state: dict) -> None:
        # deepcopy and pickle copy each parameter by itself
        super().__setstate__(state)
        self.repack()


def _refuse_shards(*parameters: Tensor) -> None:
    # type, not an import of torch.distributed: it is absent in some builds of torch
    if any(hasattr(p, "device_mesh") and hasattr(p, "placements") for p in parameters):
        raise TypeError(
            "weight and B are sharded one by one (DTensor; fully_shard, parallelize_module), which takes their common "
            "buffer apart; accepted: plain tensors. Use LoRALinear under FSDP2"
        )


def _repack(layer: PackedLoRALinear, _) -> None:
    """After load_state_dict(assign=True), which replaces the parameters."""
    layer.repack()
