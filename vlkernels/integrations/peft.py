"""peft's LoRA layers with a fused forward. peft 0.21 `tuners/lora/layer.py`."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..modules._children import child_problem
from ..op import Op
from ..ops.dora_linear import dora_linear
from ..ops.lora_linear import lora_linear
from . import peft_dora
from ._peft_adapters import Adapters
from .blocks import PlainLinear
from .swap import finished, training_backend


@functools.cache
def linear_class(original: type) -> type:
    """The static subclass of peft.tuners.lora.layer.Linear (`original`) that swapped layers get."""
    conv1d = _conv1d_class()

    class Linear(Adapters, original):
        """peft's lora.Linear; base product and adapter through lora_linear or dora_linear where the layer allows it."""

        def _vlkernels_values(self, x: torch.Tensor, name: str, y: torch.Tensor | None) -> tuple[Op, tuple]:
            """(op, its arguments) for one adapter: over the base layer, or over the output y so far."""
            arguments = self._vlkernels_arguments(name)
            if name in self.lora_variant:
                return dora_linear, peft_dora.values(self, x, name, arguments)
            if y is not None:
                arguments |= {"weight": None, "bias": None, "base": y}
            return lora_linear, lora_linear.values(x=x, **arguments)

        def _vlkernels_arguments(self, name: str) -> dict:
            """Arguments of lora_linear besides x, for one adapter over the base layer."""
            base = self.base_layer
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
            return self._vlkernels_low_rank(name) | {
                "weight": weight,
                "bias": base.bias,
                "dtype": weight.dtype if self.__dict__.get("_vlkernels_compute") == "base" else None,
            }

        def vlkernels_group_values(self, x: torch.Tensor) -> tuple[dict, float] | str:
            """(arguments of a group op for the active adapter, its dropout), or why this layer runs by itself."""
            reason = self._vlkernels_problem(x.dtype)
            if reason is not None:
                return reason
            names = self._vlkernels_adapters()
            if len(names) != 1:
                return f"{len(names)} adapters are active"
            if names[0] in self.lora_variant:
                return f"adapter {names[0]!r} is a {type(self.lora_variant[names[0]]).__name__}"
            arguments = self._vlkernels_arguments(names[0])
            return arguments, arguments.pop("p")

        def _vlkernels_problem(self, dtype: torch.dtype) -> str | None:
            """Why a call with x in `dtype` must take peft's own forward, or None."""
            reason = self._vlkernels_off() or child_problem(
                "base_layer", self.base_layer, (nn.Linear, PlainLinear, *conv1d)
            )
            if reason is not None:
                return reason
            if isinstance(self.base_layer, nn.Linear) and self.fan_in_fan_out:
                return "fan_in_fan_out over an nn.Linear"
            weight = self.base_layer.weight
            if dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                return f"x is {dtype} over a {weight.dtype} base without autocast"
            names = self._vlkernels_adapters()
            if not names:
                return "no active adapter on this layer"
            for name in names:
                reason = self._vlkernels_adapter_problem(name, dtype)
                if reason is None and name in self.lora_variant:
                    reason = peft_dora.problem(self, name, len(names))
                if reason is not None:
                    return reason
            return None

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            weight = self.base_layer.weight
            problem = self._vlkernels_problem(weight.dtype)
            if problem is not None:
                return training_backend(lora_linear, problem)
            name = self._vlkernels_adapters()[0]
            rows = torch.empty((1024, self.lora_A[name].weight.shape[1]), dtype=weight.dtype, device=weight.device)
            return training_backend(*self._vlkernels_values(rows, name, None))

    return finished(Linear, original, __name__)


def _conv1d_class() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


def __getattr__(name: str):
    if name == "Linear":
        from peft.tuners.lora.layer import Linear

        return linear_class(Linear)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
