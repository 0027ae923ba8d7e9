"""transformers' multimodal projectors and patch mergers with a fused forward: one family, a row a class.

Every row is [shuffle or merge] -> [norm] -> linear -> activation -> linear; it says under which names the class keeps
the parts, and how its input becomes mlp_projector's and mlp_projector's output its own. Those of one linear with a
shuffle (CONNECTORS) or a norm (GEMMA3) run linear_projector.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import backends
from ..modules._children import child_problem
from ..ops.linear_projector import linear_projector
from ..ops.mlp_projector import mlp_projector
from .swap import class_key, finished, training_backend


@dataclass(frozen=True)
class Row:
    """Where one class keeps the parts of mlp_projector.

    linear_1, act, linear_2, norm: paths of the parts; gate: of a gate with a weight of its own; norm_act: of an
    activation right after the norm. before(module, x) -> (x, op arguments), or None for an input whose handling is
    upstream's alone. first(module, x, ...) -> x: modules of the class that run before, once it is certain that a
    kernel follows. after(module, y, x) -> what the class returns.
    """

    linear_1: str = "linear_1"
    act: str = "act"
    linear_2: str = "linear_2"
    norm: str | None = None
    norm_act: str | None = None
    gate: str | None = None
    gated: bool = False
    before: Callable | None = None
    first: Callable | None = None
    after: Callable | None = None


def _square_grid(m: nn.Module, x: Tensor) -> tuple[Tensor, dict] | None:
    """(B, n, C) as a square grid, shuffled by the class's downsample factor."""
    if x.dim() != 3:
        return None
    side, s = math.isqrt(x.shape[1]), m.downsample_factor
    if side * side != x.shape[1] or side % s:
        return None
    return x.reshape(x.shape[0], side, side, x.shape[2]), {"shuffle": s}


def _as_square(m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1]) // m.downsample_factor
    return y.view(y.shape[0], side, side, y.shape[-1])


def _given_grid(m: nn.Module, x: Tensor) -> tuple[Tensor, dict] | None:
    """(B, w, h, C), shuffled by the class's factor."""
    return None if x.dim() != 4 or x.shape[1] % m.factor or x.shape[2] % m.factor else (x, {"shuffle": m.factor})


def _as_given(m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return y.view(x.shape[0], x.shape[1] // m.factor, x.shape[2] // m.factor, y.shape[-1])


def _merge(m: nn.Module, x: Tensor) -> tuple[Tensor, dict] | None:
    """(n, C) with a norm over C: hidden_size / C rows become one after it."""
    x = x.reshape(-1, x.shape[-1])
    count = m.hidden_size // x.shape[1]
    return None if count * x.shape[1] != m.hidden_size or x.shape[0] % count else (x, {"merge": count})


def _merge_either(m: nn.Module, x: Tensor) -> tuple[Tensor, dict] | None:
    """As _merge, or with the norm after it."""
    return (x.reshape(-1, m.hidden_size), {}) if m.use_postshuffle_norm else _merge(m, x)


def _norm_and_patch_merger(m: nn.Module, x: Tensor, image_sizes: Tensor) -> Tensor:
    """Mistral3 unfolds every image by its own size between norm and product: those two stay upstream's."""
    return m.patch_merger(m.norm(x), image_sizes)


def _projected(m: nn.Module, x: Tensor) -> Tensor:
    return m.proj(x)


def _pooled(m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return m.pooling(y)


_QWEN = {"linear_1": "mlp.0", "act": "mlp.1", "linear_2": "mlp.2", "norm": "ln_q", "before": _merge}

ROWS: dict[str, Row] = {
    "llava.modeling_llava:LlavaMultiModalProjector": Row(),
    "llava_next.modeling_llava_next:LlavaNextMultiModalProjector": Row(),
    "llava_onevision.modeling_llava_onevision:LlavaOnevisionMultiModalProjector": Row(),
    "video_llava.modeling_video_llava:VideoLlavaMultiModalProjector": Row(),
    "vipllava.modeling_vipllava:VipLlavaMultiModalProjector": Row(norm="projector_layernorm"),
    # the model shuffles before it calls
    "internvl.modeling_internvl:InternVLMultiModalProjector": Row(norm="layer_norm"),
    "mistral3.modeling_mistral3:Mistral3MultiModalProjector": Row(first=_norm_and_patch_merger),
    "aya_vision.modeling_aya_vision:AyaVisionMultiModalProjector": Row(
        norm="layernorm", gated=True, before=_square_grid, after=_as_square
    ),
    "cohere2_vision.modeling_cohere2_vision:Cohere2VisionMultiModalProjector": Row(
        gated=True, before=_square_grid, after=_as_square
    ),
    "lfm2_vl.modeling_lfm2_vl:Lfm2VlMultiModalProjector": Row(norm="layer_norm", before=_given_grid, after=_as_given),
    "perception_lm.modeling_perception_lm:PerceptionLMMultiModalProjector": Row(act="gelu", after=_pooled),
    "qwen2_vl.modeling_qwen2_vl:PatchMerger": Row(**_QWEN),
    "qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLPatchMerger": Row(**_QWEN),
    "qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchMerger": Row(
        linear_1="linear_fc1", act="act_fn", linear_2="linear_fc2", norm="norm", before=_merge_either
    ),
    "glm4v.modeling_glm4v:Glm4vVisionPatchMerger": Row(
        linear_1="up_proj",
        gate="gate_proj",
        act="act_fn",
        linear_2="down_proj",
        norm="post_projection_norm",
        norm_act="act1",
        first=_projected,
    ),
    # the connector's modality projection; a swapped resampler reads those of its own layers itself
    "idefics2.modeling_idefics2:Idefics2MLP": Row(
        linear_1="up_proj", gate="gate_proj", act="act_fn", linear_2="down_proj"
    ),
}

GEMMA3 = "gemma3.modeling_gemma3:Gemma3MultiModalProjector"

# Classes of a pixel shuffle by `scale_factor` and one linear layer: where they keep it.
CONNECTORS: dict[str, str] = {
    "idefics3.modeling_idefics3:Idefics3Connector": "modality_projection.proj",
    "smolvlm.modeling_smolvlm:SmolVLMConnector": "modality_projection.proj",
}
KEYS = (*ROWS, GEMMA3, *CONNECTORS)

PLAIN_LINEAR = "one linear layer without norm, shuffle or position: a single product already, nothing to fuse"

# Projectors in which neither op's form occurs.
LEFT: dict[str, str] = {
    "paligemma.modeling_paligemma:PaliGemmaMultiModalProjector": PLAIN_LINEAR,
    "llama4.modeling_llama4:Llama4MultiModalProjector": PLAIN_LINEAR,
}


def _acts() -> dict[type, str]:
    from transformers import activations as hf

    names = {
        "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh", "QuickGELUActivation": "quick_gelu", "SiLUActivation": "silu",
    }  # fmt: skip
    found = {getattr(hf, name): act for name, act in names.items() if hasattr(hf, name)}
    return found | {nn.SiLU: "silu", nn.ReLU: "relu"}


def _act_name(act: nn.Module, acts: dict[type, str]) -> str:
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return acts[type(act)]


def _one_dtype(parts: dict) -> str | None:
    """Why parameters of several dtypes are upstream's affair (autocast takes them all), or None."""
    w = parts["w1"]
    odd = next((n for n, t in parts.items() if isinstance(t, Tensor) and t.dtype != w.dtype), None)
    if odd is None or torch.is_autocast_enabled(w.device.type):
        return None
    return f"{odd} is {parts[odd].dtype}, w1 {w.dtype}"


@functools.cache
def projector_class(original: type) -> type:
    """The static subclass of a class of KEYS that swapped projectors get."""
    key = class_key(original).removeprefix("transformers.models.")
    if key == GEMMA3:
        return _gemma3_class(original)
    if key in CONNECTORS:
        return _connector_class(original, CONNECTORS[key])
    row = ROWS[key]
    acts = _acts()

    class Fused(original):
        def forward(self, *args, **kwargs):
            parts = self._vlkernels_parts() if args and not kwargs else "called with keyword arguments"
            values = parts if isinstance(parts, str) else self._vlkernels_values(args[0], parts)
            if isinstance(values, str):
                return super().forward(*args, **kwargs)
            backend = backends.choose(mlp_projector, values)
            if backend == "reference":
                return super().forward(*args, **kwargs)
            if row.first is not None:
                values = self._vlkernels_values(row.first(self, *args), parts)
            y = mlp_projector.run(values, backend)
            return y if row.after is None else row.after(self, y, args[0])

        def _vlkernels_values(self, x: Tensor, parts: dict) -> tuple | str:
            """Checked arguments of mlp_projector, or why this call is upstream's own."""
            shaped = (x, {}) if row.before is None else row.before(self, x)
            if shaped is None:
                return f"an input of shape {tuple(x.shape)}"
            x, arguments = shaped
            weight = parts["w1"]
            if x.shape[-1] * arguments.get("shuffle", 1) ** 2 * arguments.get("merge", 1) != weight.shape[1]:
                return f"{x.shape[-1]} channels, and linear_1 takes {weight.shape[1]}"
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                return f"x is {x.dtype} over {weight.dtype} weights without autocast"
            level = self.__dict__.get("_vlkernels_level", 0)
            return mlp_projector.values(x, **parts, **arguments, gated=row.gated, level=level)

        def _vlkernels_parts(self) -> dict | str:
            """Weights, activation and norm as they are now, or which child stands in the way."""
            parts = self._vlkernels_children()
            return parts if isinstance(parts, str) else _one_dtype(parts) or parts

        def _vlkernels_children(self) -> dict | str:
            container = self
            for name in row.linear_1.split(".")[:-1]:
                container = getattr(container, name)
                if (reason := child_problem(name, container, (nn.Sequential,))) is not None:
                    return reason
            first, act, second = (self.get_submodule(path) for path in (row.linear_1, row.act, row.linear_2))
            for name, child in ((row.linear_1, first), (row.linear_2, second)):
                if (reason := child_problem(name, child, (nn.Linear,))) is not None:
                    return reason
            if (reason := child_problem(row.act, act, (*acts, nn.GELU))) is not None:
                return reason
            parts = {"w1": first.weight, "w2": second.weight, "b1": first.bias, "b2": second.bias}
            parts["act"] = _act_name(act, acts)
            if row.gate is not None:
                gate = getattr(self, row.gate)
                if (reason := child_problem(row.gate, gate, (nn.Linear,))) is not None:
                    return reason
                if gate.bias is not None or first.bias is not None:
                    return f"{row.gate} or {row.linear_1} has a bias"
                parts["wg"] = gate.weight
            if row.norm_act is not None:
                norm_act = getattr(self, row.norm_act)
                if (reason := child_problem(row.norm_act, norm_act, (*acts, nn.GELU))) is not None:
                    return reason
                parts["norm_act"] = _act_name(norm_act, acts)
            norm = None if row.norm is None else getattr(self, row.norm)
            if norm is None:
                return parts
            rms = type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")
            reason = child_problem(row.norm, norm, (type(norm),) if rms else (nn.LayerNorm,))
            if reason is not None:
                return reason
            return parts | {
                "norm": "rms" if rms else "layer",
                "norm_weight": norm.weight,
                "norm_bias": None if rms else norm.bias,
                "eps": norm.variance_epsilon if rms else norm.eps,
            }

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            parts = self._vlkernels_parts()
            if isinstance(parts, str):
                return training_backend(mlp_projector, parts)
            w1 = parts["w1"]
            # as after the shuffle, which no kernel refuses by itself; a norm over fewer channels than w1 takes is
            # one before a merge
            channels = parts["norm_weight"].shape[0] if parts.get("norm_weight") is not None else w1.shape[1]
            merge = w1.shape[1] // channels
            if merge * channels != w1.shape[1]:
                return training_backend(mlp_projector, f"{row.norm} has {channels} channels, w1 {w1.shape[1]}")
            x = torch.empty((merge, channels), dtype=w1.dtype, device=w1.device)
            return training_backend(mlp_projector, mlp_projector.values(x, **parts, gated=row.gated, merge=merge))

        def vlkernels_configure(self, projector_level: int = 0, **_) -> None:
            if projector_level == 0:
                self.__dict__.pop("_vlkernels_level", None)
            else:
                self._vlkernels_level = projector_level

    return finished(Fused, original, __name__)


def _gemma3_class(original: type) -> type:
    """Gemma 3's projector: average pool over the grid, RMSNorm with 1 + weight, a product with a weight (in, out)."""

    class Fused(original):
        def forward(self, *args, **kwargs):
            values = self._vlkernels_values(*args) if len(args) == 1 and not kwargs else "called with keyword arguments"
            if isinstance(values, str):
                return super().forward(*args, **kwargs)
            backend = backends.choose(linear_projector, values)
            if backend == "reference":
                return super().forward(*args, **kwargs)
            # tokens stay the last axis but one: upstream's transpose, copy and transpose back move the map three times
            x = args[0]
            B, side, k = x.shape[0], self.tokens_per_side, self.kernel_size
            pooled = x.view(B, side, k, side, k, x.shape[2]).mean((2, 4)).flatten(1, 2)
            return linear_projector.run((pooled, *values[1:]), backend).type_as(x)

        def _vlkernels_values(self, x: Tensor) -> tuple | str:
            """Checked arguments of linear_projector on the unpooled x, or why this call is upstream's own."""
            norm, weight = self.mm_soft_emb_norm, self.mm_input_projection_weight
            reason = child_problem("mm_soft_emb_norm", norm, (type(norm),))
            if reason is None and type(norm).__name__ != "Gemma3RMSNorm":
                reason = f"mm_soft_emb_norm is a {type(norm).__name__}"
            reason = reason or child_problem("avg_pool", self.avg_pool, (nn.AvgPool2d,))
            if reason is not None:
                return reason
            if type(weight) is not nn.Parameter:
                return f"mm_input_projection_weight is a {type(weight).__name__}"
            # under autocast pool and norm keep x's dtype with float32 inside, and the product alone changes it: the
            # kernel reads x and the norm's weight as they are and rounds once, to the product's dtype
            autocast = torch.is_autocast_enabled(x.device.type)
            if norm.weight.dtype != weight.dtype and not autocast:
                return f"mm_soft_emb_norm is {norm.weight.dtype}, the weight {weight.dtype}"
            tokens = (self.tokens_per_side * self.kernel_size) ** 2
            if x.dim() != 3 or x.shape[1] != tokens or not x.is_contiguous():
                return f"an input of shape {tuple(x.shape)}"
            if x.dtype != weight.dtype and not autocast:
                return f"x is {x.dtype} over a {weight.dtype} weight without autocast"
            return linear_projector.values(
                x, weight.t(), norm_weight=norm.weight, norm="rms", eps=norm.eps, norm_offset=1.0
            )

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            weight = self.mm_input_projection_weight
            tokens = (self.tokens_per_side * self.kernel_size) ** 2
            x = torch.empty((1, tokens, weight.shape[0]), dtype=weight.dtype, device=weight.device)
            return training_backend(linear_projector, self._vlkernels_values(x))

        def vlkernels_configure(self, **_) -> None:
            """There is nothing to choose."""

    return finished(Fused, original, __name__)


def _connector_class(original: type, path: str) -> type:
    """Idefics3's and SmolVLM's connector: a pixel shuffle in one copy, where upstream's two permutations are a copy
    each, and the product. Nothing is rounded differently, so the result is upstream's in every bit, on any device;
    kernels are not needed for it."""
    holder, _, _ = path.rpartition(".")

    class Fused(original):
        def forward(self, *args, **kwargs):
            values = self._vlkernels_values(*args) if len(args) == 1 and not kwargs else "called with keyword arguments"
            if isinstance(values, str):
                return super().forward(*args, **kwargs)
            return linear_projector.run(values, backends.choose(linear_projector, values))

        def _vlkernels_values(self, x: Tensor) -> tuple | str:
            """Checked arguments of linear_projector, or why this call is upstream's own."""
            linear = self._vlkernels_linear()
            if isinstance(linear, str):
                return linear
            s, weight = self.scale_factor, linear.weight
            side = math.isqrt(x.shape[1]) if x.dim() == 3 else 0
            if side == 0 or side * side != x.shape[1] or side % s or x.shape[2] * s * s != weight.shape[1]:
                return f"an input of shape {tuple(x.shape)}"
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return f"x is {x.dtype} over a {weight.dtype} weight without autocast"
            x = x.reshape(x.shape[0], side, side, x.shape[2])
            return linear_projector.values(x, weight, linear.bias, shuffle=s)

        def _vlkernels_linear(self) -> nn.Linear | str:
            """The linear layer as it is now, or which child stands in the way."""
            container = self.get_submodule(holder)
            # upstream's holder only calls the layer
            if type(container).__module__ != original.__module__ or not type(container).__name__.endswith("SimpleMLP"):
                return f"{holder} is a {type(container).__name__}"
            linear = self.get_submodule(path)
            reason = child_problem(holder, container, (type(container),))
            return reason or child_problem(path, linear, (nn.Linear,)) or linear

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            linear, s = self._vlkernels_linear(), self.scale_factor
            if isinstance(linear, str):
                return training_backend(linear_projector, linear)
            shape = (1, s * s, linear.weight.shape[1] // (s * s))
            x = torch.empty(shape, dtype=linear.weight.dtype, device=linear.weight.device)
            chosen, _ = training_backend(linear_projector, self._vlkernels_values(x))
            return chosen, "plain PyTorch, with one copy for the shuffle where upstream makes two"

        def vlkernels_configure(self, **_) -> None:
            """There is nothing to choose."""

    return finished(Fused, original, __name__)


def __getattr__(name: str):
    import importlib

    for key in KEYS:
        module, _, cls = key.partition(":")
        if cls == name:
            return projector_class(getattr(importlib.import_module(f"transformers.models.{module}"), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
