"""How an inserted module takes part in a layer's forward: the layer's own forward runs over a stand-in of the layer.

A host is a module whose class became a static subclass of its own class; its forward hands the original forward a
View in place of self, on which some children are wrapped. No child is changed, hooked or replaced: a LoRA, a hook or
sharding of a child, put there before or after, acts as ever. A class, and not a hook or a forward on the instance:
gradient checkpointing wraps the class's forward (a hook would stand outside of it, an instance's forward would turn it
off), deepcopy and pickle carry no closures over the old model, and FSDP2 and recorded outputs find the class by its
name and by isinstance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .context import state_of

PREFIX = "vlkernels_"  # of the attached children's names


class View:
    """A module as its own forward sees it: its attributes, some of them wrapped."""

    forward = None  # transformers' checkpointing looks whether this is the outermost forward

    def __init__(self, host: nn.Module):
        self._host, self._wrapped = host, {}

    def __getattr__(self, name: str):
        wrapped = self._wrapped
        return wrapped[name] if name in wrapped else getattr(self._host, name)

    def wrap(self, name: str, make: Callable) -> None:
        """From now on `name` is make(what it was)."""
        inner = getattr(self, name)
        self._wrapped[name] = _Wrapped(inner, make(inner))


class _Wrapped:
    """Another call of a child; its attributes are the child's."""

    def __init__(self, inner: Callable, run: Callable):
        self._inner, self._run = inner, run

    def __call__(self, *args, **kwargs):
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def on_input(view: View, name: str, see: Callable[[Tensor], None]) -> None:
    """see(x), x what the child is given first, before it runs."""

    def make(inner):
        def run(*args, **kwargs):
            see(args[0] if args else kwargs["hidden_states"])
            return inner(*args, **kwargs)

        return run

    view.wrap(name, make)


def on_output(view: View, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """The child's output y, or the first of a tuple of them, becomes change(y)."""

    def make(inner):
        def run(*args, **kwargs):
            y = inner(*args, **kwargs)
            return (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)

        return run

    view.wrap(name, make)


@functools.cache
def host_class(original: type) -> type:
    """The subclass of a module's class that a host gets; `_vlkernels_context` and `_vlkernels_parts` are its own."""
    parameters = inspect.signature(original.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]

    class Host(original):
        vlkernels_host = original

        def __call__(self, *args, **kwargs):
            context = self._vlkernels_context
            if not self._vlkernels_carries:
                return super().__call__(*args, **kwargs)
            # as arguments: a checkpointed layer runs again in backward, perhaps after the next batch was set, and the
            # reentrant kind gives gradients to tensors among its positional arguments only
            given = context.given
            return super().__call__(*args, *given.tensors(), vlkernels_given=given, **kwargs)

        def forward(self, *args, vlkernels_given=None, **kwargs):
            context = self._vlkernels_context
            if vlkernels_given is None:
                return self._vlkernels_run(args, kwargs)
            count = len(vlkernels_given.tensors())
            before = context.given
            context.given = vlkernels_given.over(args[len(args) - count :])
            try:
                return self._vlkernels_run(args[: len(args) - count], kwargs)
            finally:
                context.given = before

        def _vlkernels_run(self, args, kwargs):
            if not self._vlkernels_parts:
                return super().forward(*args, **kwargs)
            bound = dict(zip(names, args, strict=False)) | kwargs
            view = View(self)
            for name in self._vlkernels_parts:
                getattr(self, PREFIX + name).wire(view, bound)
            return original.forward(view, **bound)

        def __reduce_ex__(self, protocol):
            state = self.__dict__.copy()
            state.pop("_compiled_call_impl", None)
            return _revived, (original,), state

    # the original's name: accelerate's and FSDP2's policies look layers up by it
    Host.__name__, Host.__qualname__ = original.__name__, original.__qualname__
    Host.__module__ = __name__
    return Host


def _revived(original: type) -> nn.Module:
    """An empty host, for copy and pickle."""
    cls = host_class(original)
    return cls.__new__(cls)


def before_model(module: nn.Module, args) -> None:
    """A hook of the model that owns the layers: what shared modules make of the batch, once for all layers of a pass.

    Within the model's forward, so that sharded parameters are at hand and each pass has a graph of its own.
    """
    context = module._vlkernels_home
    for name, modules in context.shared.items():
        given = context.set_as.get(name)
        make = functools.partial(context.integrators[name].made, context, given)
        if torch.is_grad_enabled() or module.training or torch.compiler.is_compiling():
            made = make()
        else:
            parameters = (p for m in modules.values() for p in m.parameters())
            made = context.keep((name,), (given, _autocast(), state_of(parameters)), make)
        context.given = context.given.plus(name, made)


def _autocast() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def after_model(module: nn.Module, args, output) -> None:
    """Nothing of the pass is kept."""
    context = module._vlkernels_home
    for name in context.shared:
        context.given = context.given.plus(name, context.set_as.get(name))


def become_home(module: nn.Module, context) -> None:
    if "_vlkernels_home" not in module.__dict__:
        module._vlkernels_home = context
        module.register_forward_pre_hook(before_model)
        module.register_forward_hook(after_model)


def leave_home(module: nn.Module) -> None:
    del module._vlkernels_home
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (before_model, after_model)]:
            del hooks[key]


def is_host(module: nn.Module) -> bool:
    return getattr(type(module), "vlkernels_host", None) is not None
