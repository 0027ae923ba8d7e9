"""peft's LoRA layers over bitsandbytes' 4-bit linear, with a fused forward. peft 0.21 `tuners/lora/bnb.py`."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..modules import _quant_state
from ..modules._children import hook_problem
from ..op import Op
from ..ops import _nf4
from ..ops.lora_linear import lora_linear
from ._peft_adapters import Adapters
from .swap import finished, training_backend


class _Quant:
    """The op's `quant` tensor of a bitsandbytes QuantState, made anew when the state's tensors are others or changed.

    A cache beside the parameters: neither copied nor saved with its module.
    """

    def __init__(self):
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.versions: tuple[int, ...] = ()
        self.quant: torch.Tensor | None = None
        self.facts: _quant_state.Facts | None = None

    def of(self, state) -> tuple[torch.Tensor, _quant_state.Facts]:
        """(quant, facts). Raises ValueError for a state that this library cannot read."""
        if not self.holds(state):
            self.quant, self.facts = _quant_state.of_object(state)
            self.tensors = _tensors(state)
            self.versions = tuple(t._version for t in self.tensors)
        return self.quant, self.facts

    def holds(self, state) -> bool:
        tensors = _tensors(state)
        if len(tensors) != len(self.tensors) or any(a is not b for a, b in zip(tensors, self.tensors, strict=True)):
            return False
        # dynamo does not trace versions; its guards see other tensors
        return torch.compiler.is_compiling() or self.versions == tuple(t._version for t in tensors)

    def __reduce__(self):  # for copy.deepcopy too
        return _Quant, ()


def _tensors(state) -> tuple[torch.Tensor, ...]:
    nested = state.state2
    own = (state.code, state.absmax)
    return own if nested is None else (*own, state.offset, nested.code, nested.absmax)


@functools.cache
def linear4bit_class(original: type) -> type:
    """The static subclass of peft.tuners.lora.bnb.Linear4bit (`original`) that swapped layers get."""
    *bases, params = _bitsandbytes_classes()

    class Linear4bit(Adapters, original):
        """peft's lora.bnb.Linear4bit; the 4-bit product and the low-rank branch through the op lora_linear.

        As upstream the base computes in its compute dtype (the input's, where none was set), with the bias cast to it,
        and the result has the input's dtype. The weight is rounded once, to the compute dtype.
        """

        vlkernels_returns_input_dtype = True

        def _vlkernels_finished(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            base = self.base_layer
            if not base.compute_type_is_set:
                # what upstream's first forward leaves behind
                base.set_compute_type(x)
                base.compute_type_is_set = True
            return y.to(x.dtype)

        def _vlkernels_values(self, x: torch.Tensor, name: str, y: torch.Tensor | None) -> tuple[Op, tuple]:
            arguments = self._vlkernels_arguments(name, x.dtype)
            if y is not None:
                arguments |= {"weight": None, "quant": None, "bias": None, "base": y}
            return lora_linear, lora_linear.values(x=x, **arguments)

        def _vlkernels_arguments(self, name: str, dtype: torch.dtype) -> dict:
            """Arguments of lora_linear besides x (in `dtype`), for one adapter over the base layer."""
            base, compute = self.base_layer, self._vlkernels_compute_dtype(dtype)
            quant, facts = self._vlkernels_quant(base.weight.quant_state)
            return self._vlkernels_low_rank(name) | {
                "weight": _bytes_of(base.weight, _nf4.packed_count(facts.shape)),
                "quant": quant,
                "bias": None if base.bias is None else base.bias.to(compute),
                "dtype": compute if self.__dict__.get("_vlkernels_compute") == "base" else None,
                "blocksize": facts.blocksize,
            }

        def vlkernels_group_values(self, x: torch.Tensor) -> tuple[dict, float] | str:
            """(arguments of a group op for the active adapter, its dropout), or why this layer runs by itself."""
            reason = self._vlkernels_problem(x.dtype)
            if reason is not None:
                return reason
            if not self.base_layer.compute_type_is_set:
                return "base_layer has no compute dtype before its first call"
            names = self._vlkernels_adapters()
            if len(names) != 1:
                return f"{len(names)} adapters are active"
            arguments = self._vlkernels_arguments(names[0], x.dtype)
            return arguments, arguments.pop("p")

        def _vlkernels_quant(self, state) -> tuple[torch.Tensor, _quant_state.Facts]:
            if "_vlkernels_cache" not in self.__dict__:
                self._vlkernels_cache = _Quant()
            return self._vlkernels_cache.of(state)

        def _vlkernels_compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
            base = self.base_layer
            return (base.compute_dtype if base.compute_type_is_set else None) or dtype

        def _vlkernels_problem(self, dtype: torch.dtype) -> str | None:
            """Why a call with x in `dtype` must take peft's own forward, or None."""
            reason = self._vlkernels_off() or self._vlkernels_base_problem()
            if reason is not None:
                return reason
            device, compute = self.base_layer.weight.device.type, self._vlkernels_compute_dtype(dtype)
            if torch.is_autocast_enabled(device):
                if compute != torch.get_autocast_dtype(device):
                    return f"the compute dtype is {compute}, autocast's {torch.get_autocast_dtype(device)}"
            elif compute != dtype:
                return f"x is {dtype} and the compute dtype {compute}, without autocast"
            names = self._vlkernels_adapters()
            if not names:
                return "no active adapter on this layer"
            for name in names:
                if name in self.lora_variant:
                    return f"adapter {name!r} is a {type(self.lora_variant[name]).__name__}"
                if (reason := self._vlkernels_adapter_problem(name, dtype)) is not None:
                    return reason
            return None

        def _vlkernels_base_problem(self) -> str | None:
            base = self.base_layer
            if type(base) not in bases:
                return f"base_layer is a {type(base).__name__}"
            if (reason := hook_problem("base_layer", base)) is not None:
                return reason
            if "weight" in base.__dict__ or hasattr(base, "parametrizations"):
                return "base_layer is parametrised"
            if base.bias is not None and type(base.bias) not in (nn.Parameter, torch.Tensor):
                return f"base_layer holds a {type(base.bias).__name__}, not a plain tensor"
            weight = base.weight
            if type(weight) is not params:
                return f"base_layer holds a {type(weight).__name__}, not a Params4bit"
            state = weight.quant_state
            if state is None or weight.is_meta:
                return "base_layer is not quantised yet"
            if getattr(state, "packing_format_for_cpu", False):
                return "base_layer is packed for inference on a CPU"
            try:
                _, facts = self._vlkernels_quant(state)
            except ValueError as error:
                return f"base_layer: {error}"
            if facts.shape != (base.out_features, base.in_features):
                return f"base_layer's weight was quantised as {facts.shape}"
            if weight.numel() * weight.element_size() != _nf4.packed_count(facts.shape) or not weight.is_contiguous():
                return f"base_layer's packed weight is {tuple(weight.shape)} {weight.dtype}"
            return None

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            base = self.base_layer
            dtype = getattr(base, "compute_dtype", None) or torch.float32
            problem = self._vlkernels_problem(dtype)
            if problem is not None:
                return training_backend(lora_linear, problem)
            name = self._vlkernels_adapters()[0]
            rows = torch.empty((1024, base.in_features), dtype=dtype, device=base.weight.device)
            return training_backend(*self._vlkernels_values(rows, name, None))

        def vlkernels_configure(self, lora_compute: str = "peft", **_) -> None:
            # made again on use; `unswap` leaves nothing behind
            self.__dict__.pop("_vlkernels_cache", None)
            super().vlkernels_configure(lora_compute)

    return finished(Linear4bit, original, __name__)


def _bytes_of(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The packed weight as a plain (count, 1) uint8 tensor; bitsandbytes' quant_storage may be another dtype."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().view(-1).view(torch.uint8).view(count, 1)


def _bitsandbytes_classes() -> tuple[type, ...]:
    from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit

    return Linear4bit, LinearFP4, LinearNF4, Params4bit


def __getattr__(name: str):
    if name == "Linear4bit":
        from peft.tuners.lora.bnb import Linear4bit

        return linear4bit_class(Linear4bit)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
