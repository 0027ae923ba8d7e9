"""transformers' attention and feed-forward blocks whose projections carry peft adapters: one node for q, k, v and one
for gate, up, down.

Attention: every class named here calls q_proj, k_proj and v_proj on the same hidden states and does the rest (rotary
embedding, cache, attention, output) itself. The fused class computes the three in one op and hands each projection its
result; the class's own forward runs unchanged. Feed-forward: down(act(gate(x)) * up(x)) is one op. A decoder layer is
swapped on request (`fuse_norms`): its norms and its second residual go into the two ops.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import backends
from ..modules._children import child_problem, hook_problem
from ..ops.lora_mlp import lora_mlp
from ..ops.lora_qkv import lora_qkv
from .swap import class_key, finished, training_backend

_FAMILIES = ("llama.modeling_llama:Llama", "mistral.modeling_mistral:Mistral", "qwen2.modeling_qwen2:Qwen2",
             "qwen3.modeling_qwen3:Qwen3", "gemma.modeling_gemma:Gemma")  # fmt: skip
ATTENTION = tuple(f"{family}Attention" for family in _FAMILIES)
MLP = tuple(f"{family}MLP" for family in _FAMILIES)
LAYERS = tuple(f"{family}DecoderLayer" for family in _FAMILIES)

# the activation modules of transformers' ACT2FN that lora_mlp knows, by class name
_ACTS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh",
         "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh", "ReLU": "relu",
         "QuickGELUActivation": "quick_gelu"}  # fmt: skip


# -- the projections of a block ------------------------------------------------------------------------------------


def _projection(name: str, child: nn.Module, x: Tensor) -> tuple[dict, float | None] | str:
    """(arguments of the group op, dropout of the adapter or None without one), or why the child runs by itself."""
    if not hasattr(child, "vlkernels_group_values"):
        if hasattr(child, "lora_A"):
            return f"{name} is not swapped"
        reason = child_problem(name, child, (nn.Linear, PlainLinear))
        return reason or ({"weight": child.weight, "bias": child.bias}, None)
    reason = hook_problem(name, child)
    if reason is not None:
        return reason
    values = child.vlkernels_group_values(x)
    return f"{name}: {values}" if isinstance(values, str) else values


def _group_values(block: nn.Module, names: tuple[str, ...], x: Tensor) -> dict | str:
    """Arguments of a group op for the block's projections `<name>_proj`, or why they run by themselves."""
    arguments, dropouts, computes, blocksizes = {}, set(), set(), set()
    for name in names:
        child = getattr(block, f"{name}_proj", None)
        if child is None:
            return f"there is no {name}_proj"
        found = _projection(f"{name}_proj", child, x)
        if isinstance(found, str):
            return found
        values, p = found
        if p is not None:
            dropouts.add(p)
            computes.add(values.pop("dtype"))
            blocksizes.add(values.pop("blocksize", None))
        arguments |= {f"{name}_{field}": value for field, value in values.items()}
    if not dropouts:
        return "none of its projections has an adapter"
    if len(dropouts) > 1 or len(computes) > 1:
        return f"its adapters have different dropouts {sorted(dropouts)} or compute dtypes"
    if len(blocksizes) > 1 or (None not in blocksizes and any(f"{name}_quant" not in arguments for name in names)):
        return "its projections are quantised differently"
    blocksize = blocksizes.pop()
    packed = {} if blocksize is None else {"blocksize": blocksize}
    return arguments | packed | {"p": dropouts.pop(), "dtype": computes.pop()}


def _returned(layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype that the layer returns: over a 4-bit base peft gives that of its input, also under autocast."""
    return y.to(x.dtype) if getattr(layer, "vlkernels_returns_input_dtype", False) else y


def _norm_arguments(norm: nn.Module | None) -> dict | str:
    """norm_weight, eps and offset of an RMSNorm, or why it runs by itself."""
    if norm is None:
        return {}
    kind = type(norm).__name__
    if not kind.endswith("RMSNorm"):
        return f"the norm is a {kind}"
    if (reason := child_problem("the norm", norm, (type(norm),))) is not None:
        return reason
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    offset = 1.0 if kind.startswith("Gemma") else getattr(norm, "offset", 0.0)
    return {"norm_weight": norm.weight, "eps": float(eps), "offset": float(offset)}


def _state(block: nn.Module, op, values: dict | str) -> tuple[str, str]:
    """(backend, reason) of a block's report."""
    return training_backend(op, values if isinstance(values, str) else op.values(**values))


def _rows(block: nn.Module, child: str) -> Tensor:
    """Rows such as the block sees in training, for its report."""
    layer = getattr(block, child)
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    # of a 4-bit base its compute dtype
    dtype = weight.dtype if weight.is_floating_point() else getattr(base, "compute_dtype", None) or torch.float32
    return torch.empty((1024, layer.in_features), dtype=dtype, device=weight.device)


class PlainLinear(nn.Linear):
    """nn.Linear of a swapped attention block without an adapter: it returns what the block computed for it."""

    vlkernels_fused, vlkernels_original = True, nn.Linear
    vlkernels_part = True
    _vlkernels_given = None

    def forward(self, x: Tensor) -> Tensor:
        given = self._vlkernels_given
        if given is not None and given[0] is x:
            return given[1]
        return super().forward(x)

    def vlkernels_configure(self, **_) -> None:
        pass

    def vlkernels_state(self) -> tuple[str, str]:
        return "stock", "part of its attention block"


PlainLinear.__name__ = PlainLinear.__qualname__ = "Linear"


# -- attention -----------------------------------------------------------------------------------------------------


@functools.cache
def attention_class(original: type) -> type:
    """The static subclass of an attention class that computes q, k, v in one op."""
    names = ("q", "k", "v")

    class Attention(original):
        # (RMSNorm,) that a fused decoder layer leaves to this block, during its call; bare, it would be a child
        _vlkernels_norm = ()

        def forward(self, hidden_states: Tensor, *args, **kwargs):
            norm = next(iter(self._vlkernels_norm), None)
            values = self._vlkernels_values(hidden_states, norm)
            backend = "reference"
            if not isinstance(values, str):
                values = lora_qkv.values(**values)
                backend = backends.choose(lora_qkv, values)
            if backend == "reference":
                hidden_states = hidden_states if norm is None else norm(hidden_states)
                return super().forward(hidden_states, *args, **kwargs)
            children = [getattr(self, f"{name}_proj") for name in names]
            for child, y in zip(children, lora_qkv.run(values, backend), strict=True):
                child._vlkernels_given = (hidden_states, _returned(child, y, hidden_states))
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                for child in children:
                    child._vlkernels_given = None

        def _vlkernels_values(self, x: Tensor, norm: nn.Module | None) -> dict | str:
            extra = _norm_arguments(norm)
            if isinstance(extra, str):
                return extra
            values = _group_values(self, names, x)
            return values if isinstance(values, str) else {"x": x} | extra | values

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            return _state(self, lora_qkv, self._vlkernels_values(_rows(self, "q_proj"), None))

        def vlkernels_configure(self, **options) -> None:
            for name in names:
                child = getattr(self, f"{name}_proj", None)
                if options and type(child) is nn.Linear and "forward" not in child.__dict__:
                    child.__class__ = PlainLinear

    return finished(Attention, original, __name__)


# -- feed-forward --------------------------------------------------------------------------------------------------


@functools.cache
def mlp_class(original: type) -> type:
    """The static subclass of a gated feed-forward class that is one op."""
    names = ("gate", "up", "down")

    class MLP(original):
        def forward(self, x: Tensor) -> Tensor:
            values = self._vlkernels_values(x, None)
            if isinstance(values, str):
                return super().forward(x)
            values = lora_mlp.values(**values)
            backend = backends.choose(lora_mlp, values)
            if backend == "reference":
                return super().forward(x)
            return _returned(self.down_proj, lora_mlp.run(values, backend), x)

        def _vlkernels_values(self, x: Tensor, norm: nn.Module | None) -> dict | str:
            """Arguments of lora_mlp; with the layer's norm also the residual."""
            act = _ACTS.get(type(self.act_fn).__name__)
            if act is None:
                return f"the activation is a {type(self.act_fn).__name__}"
            if (reason := hook_problem("act_fn", self.act_fn)) is not None:
                return reason
            extra = _norm_arguments(norm)
            if isinstance(extra, str):
                return extra
            values = _group_values(self, names, x)
            if isinstance(values, str):
                return values
            return {"x": x, "act": act, "residual": norm is not None} | extra | values

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            return _state(self, lora_mlp, self._vlkernels_values(_rows(self, "gate_proj"), None))

        def vlkernels_configure(self, **_) -> None:
            pass

    return finished(MLP, original, __name__)


# -- decoder layer -------------------------------------------------------------------------------------------------


@functools.cache
def layer_class(original: type) -> type:
    """The static subclass of a pre-norm decoder layer whose norms and second residual go into the blocks' ops."""

    class DecoderLayer(original):
        def forward(self, hidden_states: Tensor, *args, **kwargs):
            if args or self._vlkernels_problem() is not None:
                return super().forward(hidden_states, *args, **kwargs)
            attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
            attention._vlkernels_norm = (self.input_layernorm,)
            try:
                branch, _ = attention(hidden_states=hidden_states, **kwargs)
            finally:
                attention._vlkernels_norm = ()
            hidden_states = hidden_states + branch
            values = mlp._vlkernels_values(hidden_states, norm)
            if not isinstance(values, str):
                values = lora_mlp.values(**values)
                backend = backends.choose(lora_mlp, values)
                if backend != "reference":
                    return _returned(mlp.down_proj, lora_mlp.run(values, backend), hidden_states)
            return hidden_states + mlp(norm(hidden_states))

        def _vlkernels_problem(self) -> str | None:
            for name in ("self_attn", "mlp"):
                child = getattr(self, name)
                if not hasattr(child, "_vlkernels_values"):
                    return f"{name} is not swapped"
                if (reason := hook_problem(name, child)) is not None:
                    return reason
            found = (_norm_arguments(getattr(self, n)) for n in ("input_layernorm", "post_attention_layernorm"))
            return next((reason for reason in found if isinstance(reason, str)), None)

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            problem = self._vlkernels_problem()
            if problem is not None:
                return "stock", problem
            values = self.mlp._vlkernels_values(_rows(self.mlp, "gate_proj"), self.post_attention_layernorm)
            return _state(self, lora_mlp, values)

        def vlkernels_configure(self, **_) -> None:
            pass

    return finished(DecoderLayer, original, __name__)


def wanted(module: nn.Module, known: type, fuse_norms: bool) -> bool:
    """Whether a module of the class `known` is to be swapped or reported: blocks are for adapters; without one, their
    SwiGLU and norms are Liger's to fuse."""
    key = class_key(known).removeprefix("transformers.models.")
    if key not in (*ATTENTION, *MLP, *LAYERS):
        return True
    return (fuse_norms or key not in LAYERS) and any(hasattr(m, "lora_A") for m in module.modules())


_MAKERS = {"Attention": attention_class, "MLP": mlp_class, "DecoderLayer": layer_class}


def __getattr__(name: str):
    """A fused class by its original's name, which is how pickle and deepcopy find it."""
    import importlib

    for key in (*ATTENTION, *MLP, *LAYERS):
        module, _, cls = key.partition(":")
        if cls == name:
            original = getattr(importlib.import_module(f"transformers.models.{module}"), name)
            return next(make(original) for suffix, make in _MAKERS.items() if name.endswith(suffix))
    if name == "Linear":
        return PlainLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
