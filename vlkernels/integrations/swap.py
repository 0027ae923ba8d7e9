"""Swap the modules of a model that exists for fused ones, and back.

A swapped module keeps its object, parameters and names: only its class becomes a static subclass of its own class,
whose forward takes the fused path when its children allow it at that moment and calls the original forward when not.
"""

from __future__ import annotations

import fnmatch
import importlib
import types
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .. import backends

# "module:Class" of what can be swapped -> "module:function" that makes the fused class of it; nothing is imported
# before a model holds an instance. transformers' projectors are listed in integrations/transformers.py.
TARGETS: dict[str, str] = {
    "peft.tuners.lora.layer:Linear": "vlkernels.integrations.peft:linear_class",
    "peft.tuners.lora.bnb:Linear4bit": "vlkernels.integrations.peft_bnb:linear4bit_class",
    "peft.tuners.adaption_prompt.layer:AdaptedAttention": "vlkernels.integrations.peft_adaption:attention_class",
}

# Modules that users expect to see swapped and that stay as they are, with the reason.
LEFT: dict[str, str] = {
    "peft.tuners.lora.layer:Embedding": "LoRA on embeddings has no fused kernel",
    "peft.tuners.lora.layer:Conv1d": "LoRA on convolutions has no fused kernel",
    "peft.tuners.lora.layer:Conv2d": "LoRA on convolutions has no fused kernel",
    "peft.tuners.lora.layer:Conv3d": "LoRA on convolutions has no fused kernel",
    "peft.tuners.lora.layer:MultiheadAttention": "LoRA on nn.MultiheadAttention has no fused kernel",
    "peft.tuners.adaption_prompt.layer:AdaptedAttentionGPT": "GPT-2's prompt is added after the output projection",
    "peft.tuners.lora.bnb:Linear8bitLt": "an 8-bit base has no fused kernel",
    # every other kind, quantised bases and parameters without a module among them
    "peft.tuners.lora.layer:LoraLayer": "this kind of LoRA layer has no fused kernel",
}


@dataclass(frozen=True)
class Entry:
    """One module of the report; `reason` says why it was left, or why its backend is not the first choice."""

    path: str
    cls: str
    swapped: bool
    backend: str
    reason: str


class Report:
    """What `swap` did, module by module; printing it looks at the modules as they are at that moment."""

    def __init__(self, model: nn.Module, found: list[tuple[str, str, str | None]]):
        self._model = weakref.ref(model)
        self._found = found  # path, class key, why it was left (None when swapped)

    @property
    def entries(self) -> list[Entry]:
        model = self._model()
        modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
        entries = []
        for path, cls, left in self._found:
            module = modules.get(path)
            if left is not None:
                entries.append(Entry(path, cls, False, "stock", left))
            elif module is None:
                entries.append(Entry(path, cls, False, "stock", "no longer in the model"))
            elif not getattr(module, "vlkernels_fused", False):
                entries.append(Entry(path, cls, False, "stock", "swapped back"))
            else:
                backend, reason = module.vlkernels_state()
                entries.append(Entry(path, cls, True, backend, reason))
        return entries

    @property
    def swapped(self) -> list[str]:
        return [e.path for e in self.entries if e.swapped]

    def __bool__(self) -> bool:
        return bool(self.swapped)

    def __len__(self) -> int:
        return len(self.swapped)

    def __str__(self) -> str:
        entries = self.entries
        if not entries:
            return "vlkernels.swap: nothing to swap in this model"
        done = [e for e in entries if e.swapped]
        lines = [f"vlkernels.swap: {len(done)} modules swapped, {len(entries) - len(done)} left"]
        groups: dict[tuple, list[str]] = {}
        for e in entries:
            groups.setdefault((e.swapped, e.cls.rpartition(".")[2], e.backend, e.reason), []).append(e.path)
        for (swapped, cls, backend, reason), paths in groups.items():
            head = f"  {'swapped' if swapped else 'left   '} {cls} x {len(paths)} -> {backend}"
            lines.append(head + (f": {reason}" if reason else ""))
            lines += [f"      {path}" for path in _shorten(paths)]
        return "\n".join(lines)

    __repr__ = __str__


def _shorten(paths: list[str], most: int = 6) -> list[str]:
    if len(paths) <= most:
        return paths
    return [*paths[: most - 1], f"... and {len(paths) - most + 1} more"]


def swap(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    lora_compute: str = "peft",
    projector_level: int = 0,
    fuse_norms: bool = False,
    strict: bool = False,
) -> Report:
    """Give the model's known modules their fused forward, in place; `unswap` gives the original back.

    Nothing is renamed, moved, packed or copied: the state dict, optimizer state, hooks, gradient checkpointing,
    deepcopy, peft's save and load stay what they were. On CPU, or where no kernel can run, a swapped module runs its
    original forward, bit for bit.

    Args:
        model: any nn.Module; a peft model, or a model with peft layers inside.
        include, exclude: fnmatch patterns of module paths or class names ("*.language_model.*", "Linear").
        lora_compute: "peft" computes the low-rank branch in peft's dtypes (float32 adapters over a bf16 base: float32);
            "base" computes it in the base weight's dtype.
        projector_level: 0 keeps a projector's first product for backward, 1 recomputes it.
        fuse_norms: swap decoder layers with adapters too: their RMSNorms and second residual go into the ops of the
            attention and feed-forward blocks, and the normalised states are no longer kept for backward.
        strict: raise LookupError when nothing was swapped.

    Returns: a Report; `print(report)` shows what was swapped, what was not, and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if lora_compute not in ("peft", "base"):
        raise ValueError(f'lora_compute is {lora_compute!r}; accepted: "peft", "base"')
    if projector_level not in (0, 1):
        raise ValueError(f"projector_level is {projector_level!r}; accepted: 0, 1")
    options = {"lora_compute": lora_compute, "projector_level": projector_level}
    from . import blocks

    targets, left = registry()
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    found: list[tuple[str, str, str | None]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        if (original := _original(module)) is not None:
            if not getattr(module, "vlkernels_part", False):
                found.append((path, _dotted(original), None))
            module.vlkernels_configure(**options)
            continue
        known = next((cls for cls in type(module).__mro__ if class_key(cls) in targets or class_key(cls) in left), None)
        if known is None or not blocks.wanted(module, known, fuse_norms):
            continue
        reason = left.get(class_key(known))
        if reason is None and known is not type(module):
            # FSDP2 makes such a subclass: swap first, shard then
            reason = f"it is a {type(module).__name__}, a subclass; only the class itself is swapped"
        if reason is None and include is not None and not _matches(path, known.__name__, include):
            reason = "not among include"
        if reason is None and exclude is not None and _matches(path, known.__name__, exclude):
            reason = "among exclude"
        if reason is None:
            reason = set_class(module, _fused_class(targets[class_key(known)], known))
        found.append((path, _dotted(known), reason))
        if reason is None:
            module.vlkernels_configure(**options)
    report = Report(model, found)
    if strict and not report:
        reasons = "; ".join(sorted({why for _, _, why in found if why})) or "no module of a known class"
        raise LookupError(f"strict=True and nothing was swapped: {reasons}. Known classes: {', '.join(targets)}")
    return report


def unswap(model: nn.Module) -> int:
    """Give every swapped module in the model its original class back; returns how many there were."""
    count = 0
    for path, module in model.named_modules():
        if (original := _original(module)) is None:
            continue
        if "vlkernels_fused" not in vars(type(module)):
            raise RuntimeError(f"{path} is a {type(module).__name__} now (sharded?); unswap before its class changes")
        module.vlkernels_configure()
        set_class(module, original)
        count += 1
    return count


def class_key(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _original(module: nn.Module) -> type | None:
    """The class that a swapped module had, None for any other module."""
    fused = next((cls for cls in type(module).__mro__ if "vlkernels_fused" in vars(cls)), None)
    return None if fused is None else fused.vlkernels_original


def set_class(module: nn.Module, cls: type) -> str | None:
    """Set the module's class, or say why not. An accelerate hook keeps a bound forward of its own; it is rebound."""
    if "forward" in module.__dict__:
        old = module.__dict__.get("_old_forward")
        if not hasattr(module, "_hf_hook") or not isinstance(old, types.MethodType) or old.__self__ is not module:
            return "the instance carries a forward of its own, which a class cannot replace"
        module._old_forward = types.MethodType(cls.forward, module)
    module.__class__ = cls
    return None


def registry() -> tuple[dict[str, str], dict[str, str]]:
    """(what can be swapped, what is left with a reason), by "module:Class"."""
    from . import blocks, gated, qformer, resamplers
    from . import transformers as projectors

    prefix = "transformers.models."
    fused = dict.fromkeys((prefix + key for key in projectors.KEYS), f"{projectors.__name__}:projector_class")
    for room, function in ((resamplers, "resampler_class"), (qformer, "qformer_class"), (gated, "gated_class")):
        fused |= dict.fromkeys((prefix + key for key in room.KEYS), f"{room.__name__}:{function}")
    for keys, function in ((blocks.ATTENTION, "attention"), (blocks.MLP, "mlp"), (blocks.LAYERS, "layer")):
        fused |= dict.fromkeys((prefix + key for key in keys), f"{blocks.__name__}:{function}_class")
    return TARGETS | fused, LEFT | {prefix + key: reason for key, reason in projectors.LEFT.items()}


def _fused_class(target: str, original: type) -> type:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(original)


def _patterns(name: str, value) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name} is {value!r}; accepted: a pattern or patterns of module paths or class names")
    return patterns


def _matches(path: str, name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(name, p) for p in patterns)


def training_backend(op, values: tuple | str) -> tuple[str, str]:
    """(backend, reason) of a fused module's report: op(*values) in a training step, or why it runs stock."""
    if isinstance(values, str):
        return "stock", values
    with torch.enable_grad():
        decision = backends.decide(op, values)
    return decision.chosen, "" if decision.chosen == backends.ORDER[0] else decision.reason


class Shown(type):
    """Of fused classes of whole transformers models, which prints as the original: by that text transformers looks up
    which outputs a model records."""

    def __repr__(cls) -> str:
        return repr(cls.__dict__["vlkernels_original"]) if "vlkernels_original" in cls.__dict__ else super().__repr__()


def finished(fused: type, original: type, module: str) -> type:
    """The fused class under its original's name, which FSDP2 and accelerate look up, and under the path by which
    pickle finds it through `module`'s __getattr__; repr shows what it is."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (original.extra_repr(self), "vlkernels_fused=True")))

    fused.vlkernels_fused, fused.vlkernels_original, fused.extra_repr = True, original, extra_repr
    fused.__name__, fused.__qualname__, fused.__module__ = original.__name__, original.__qualname__, module
    return fused
