"""What the swapped peft layers share: when adapters may run fused, and how they run one after the other."""

from __future__ import annotations

import torch
from torch import nn

from .. import backends
from ..modules._children import child_problem
from ..op import Op


class Adapters:
    """Beside a peft LoraLayer in its swapped class, which says what its base and one adapter are."""

    _vlkernels_given = None  # (x, y) that a swapped attention block computed for this layer, during its call

    def _vlkernels_problem(self, dtype: torch.dtype) -> str | None:
        """Why a call with x in `dtype` must take peft's own forward, or None."""
        raise NotImplementedError

    def _vlkernels_values(self, x: torch.Tensor, name: str, y: torch.Tensor | None) -> tuple[Op, tuple]:
        """(op, its arguments) for one adapter: over the base layer, or over the output y so far."""
        raise NotImplementedError

    def _vlkernels_finished(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's result from the last adapter's, with what upstream's forward leaves behind."""
        return y

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        plain_call = not args and all(value is None for value in kwargs.values())
        given = self._vlkernels_given
        if plain_call and given is not None and given[0] is x:
            return given[1]
        if not plain_call or self._vlkernels_problem(x.dtype) is not None:
            return super().forward(x, *args, **kwargs)
        y = None
        for name in self._vlkernels_adapters():
            op, values = self._vlkernels_values(x, name, y)
            backend = backends.choose(op, values)
            if y is None and backend == "reference":
                return super().forward(x)
            y = op.run(values, backend)
        return self._vlkernels_finished(y, x)

    def _vlkernels_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _vlkernels_low_rank(self, name: str) -> dict:
        """Arguments of lora_linear that come from the adapter."""
        dropout, b = self.lora_dropout[name], self.lora_B[name]
        return {
            "a": self.lora_A[name].weight,
            "b": b.weight,
            "lora_bias": b.bias,
            "scale": self.scaling[name],
            "p": dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        }

    def _vlkernels_off(self) -> str | None:
        """Why no adapter runs at all, or None."""
        if self.disable_adapters:
            return "adapters are disabled"
        return "adapters are merged" if self.merged else None

    def _vlkernels_adapter_problem(self, name: str, dtype: torch.dtype) -> str | None:
        """Why adapter `name`, under an x in `dtype`, must take peft's own forward, or None; variants apart."""
        dropout = self.lora_dropout[name]
        reason = (
            child_problem("lora_A", self.lora_A[name], (nn.Linear,))
            or child_problem("lora_B", self.lora_B[name], (nn.Linear,))
            or child_problem("lora_dropout", dropout, (nn.Dropout, nn.Identity))
        )
        if reason is not None:
            return reason
        if type(dropout) is nn.Dropout and not 0.0 <= dropout.p < 1.0:
            return f"dropout {dropout.p}"
        if self.lora_A[name].bias is not None:
            return "lora_A has a bias"
        if not self.cast_input_dtype_enabled and self.lora_A[name].weight.dtype != dtype:
            return "peft's cast of the input to the adapter's dtype is off"
        return None

    def vlkernels_configure(self, lora_compute: str = "peft", **_) -> None:
        if lora_compute == "peft":
            self.__dict__.pop("_vlkernels_compute", None)
        else:
            self._vlkernels_compute = lora_compute
