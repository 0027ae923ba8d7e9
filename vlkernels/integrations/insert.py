"""Insert in-block integrators into a language model that exists, and take them out again.

    report = vlkernels.insert(model, vlkernels.GatedCrossAttention(dim_visual=1024, every=4))
    model.vlkernels.set_media(media, input_ids == media_token)      # before each batch, or before generate
    loss = model(input_ids, labels=labels).loss
    vlkernels.save_inserted(model, "gated.safetensors")
    vlkernels.remove(model)

The base model's modules, parameters and names stay; new ones are children called vlkernels_<name>.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .families import Stack, follow, stacks
from .hosts import PREFIX, become_home, host_class, is_host, leave_home
from .inserted import Inserted, InsertReport, Place
from .integrators import Integrator
from .swap import set_class

_HANDLE = "vlkernels"
# between modules of the base that a wrapper puts into their paths
_WRAPPERS = ("_orig_mod.", "base_layer.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def insert(
    model: nn.Module,
    integrator: Integrator,
    layers: int | Iterable[int] | None = None,
    *,
    freeze: bool = True,
    device=None,
    dtype: torch.dtype | None = None,
) -> InsertReport:
    """Put new modules into the layers of the language model in `model`; its own parameters keep names and values.

    Supported: GPT-2, GPT-J, OPT, Llama, T5, BART, DeBERTa-v2, Mamba of transformers, alone or inside another model,
    before or after peft. Where an integrator starts at zero the model's outputs stay those of the base, bit for bit.
    Order with others: insert, then swap and shard; peft before insert, or `train_inserted(model)` after peft, which
    freezes all that is not its own.

    Args:
        integrator: GatedCrossAttention, IdeficsCrossAttention, Adapters, AdaptivePrefix, MemVP, EpalmTokens,
            VisualExpert.
        layers: numbers of layers, in each stack that the integrator goes into; None: the integrator's own choice.
        freeze: the base's parameters no longer take gradients (peft's adapters still do); remove gives that back.
        device, dtype: of the new parameters; None: of the layer that they go into.

    Returns: an InsertReport. `model.vlkernels` takes the batch's media; the new children are vlkernels_<name>.
    Raises: TypeError, ValueError naming what does not fit; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(integrator, Integrator):
        raise TypeError(f"integrator must be a vlkernels integrator, got {type(integrator).__name__}")
    name = integrator.name
    chosen = _chosen(stacks(model), integrator)
    handle = handle_of(model) or Inserted()
    if name in handle.integrators:
        raise ValueError(
            f"{type(handle.integrators[name]).__name__} is inserted as {name!r} already; accepted: another name, or "
            "remove it first"
        )
    if not isinstance(model.__dict__.get(_HANDLE), (Inserted, type(None))):
        raise ValueError(f"{type(model).__name__} has an attribute {_HANDLE!r} of its own")
    for stack in chosen:
        if (reason := integrator.refuses(stack.family)) is not None:
            raise ValueError(f"{type(integrator).__name__}: {reason}")
    paths = {id(m): path for path, m in model.named_modules()}
    plan, places, homes = [], [], []
    for stack in chosen:
        asked = _layers(layers, stack, integrator)
        numbers = integrator.around(asked, stack)
        made = made_like(stack.layers[0], device, dtype)
        if (shared := integrator.shared(stack, made)) is not None:
            homes.append((_home(model, stack), stack.name, shared))
        for number, layer in enumerate(stack.layers):
            path = f"{stack.path}.{number}"
            if number not in numbers:
                places.append(Place(path, (), "not among the layers"))
                continue
            parts = integrator.parts(stack.family, layer, number, asked, made_like(layer, device, dtype))
            hosts = {host: follow(layer, host) for host in parts}
            for module in [layer, *hosts.values()]:
                if (reason := _host_problem(module)) is not None:
                    raise ValueError(f"{paths.get(id(module), path)}: {reason}")
            for host, part in parts.items():
                index = follow(layer, stack.family.index) if stack.family.index else number
                part.place(name, handle, stack.family, number if index is None else index)
                plan.append((layer, hosts[host], part))
            places.append(Place(path, tuple(f"{paths[id(hosts[host])]}.{PREFIX}{name}" for host in parts)))
    if not plan:
        raise ValueError(f"{type(integrator).__name__} goes into none of the layers; accepted: layers=, or every=1")
    integrator.finish([part for _, _, part in plan])
    base = list(model.named_parameters())
    # from here on nothing is refused
    for layer, host, part in plan:
        for module, carries in ((layer, True), (host, host is layer)):
            _become_host(module, handle, carries, name)
        host.add_module(PREFIX + name, part.train(host.training))
        host._vlkernels_parts.append(name)
    for home, stack_name, shared in homes:
        home.add_module(PREFIX + name, shared.train(home.training))
        handle.shared.setdefault(name, {})[stack_name] = shared
        become_home(home, handle)
    handle.parts[name] = [part for _, _, part in plan]
    kept = [p for layer in {id(m): m for m, _, _ in plan}.values() for p in integrator.keeps(layer)]
    frozen = _freeze(model, base, kept) if freeze else []
    handle.frozen += tuple(base_name(path) for path, _ in frozen)
    modules = [part for _, _, part in plan] + [shared for _, _, shared in homes]
    trained = sum(p.numel() for p in {p: None for m in modules for p in m.parameters()})
    report = InsertReport(integrator, chosen[0].family.name, places, trained, sum(p.numel() for _, p in frozen))
    handle.integrators[name], handle.reports[name] = integrator, report
    model.__dict__[_HANDLE] = handle
    return report


def remove(model: nn.Module, name: str | None = None) -> int:
    """Take out what was inserted under `name`, or all of it; returns the number of modules taken out.

    The base model is then as it was: classes, children, state dict, and which parameters take gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    handle = handle_of(model)
    if handle is None:
        raise ValueError(f"nothing was inserted into this {type(model).__name__}")
    if name is not None and name not in handle.integrators:
        raise ValueError(f"nothing is inserted as {name!r}; accepted: {', '.join(handle.integrators)}")
    names = list(handle.integrators) if name is None else [name]
    hosts = [m for m in model.modules() if is_host(m)]
    for module in hosts:
        if type(module).__mro__[0] is not host_class(type(module).vlkernels_host):
            raise ValueError(f"{type(module).__name__}: its class changed since insert (sharded?); remove before that")
    count = 0
    for module in list(model.modules()):
        for n in names:
            if PREFIX + n in module._modules:
                delattr(module, PREFIX + n)
                count += 1
    for module in hosts:
        module._vlkernels_parts = [n for n in module._vlkernels_parts if n not in names]
        module._vlkernels_for = [n for n in module._vlkernels_for if n not in names]
        if not module._vlkernels_for:
            set_class(module, type(module).vlkernels_host)
            for attribute in ("context", "carries", "parts", "for"):
                del module.__dict__[f"_vlkernels_{attribute}"]
    for module in model.modules():
        if "_vlkernels_home" in module.__dict__ and not any(PREFIX + n in module._modules for n in handle.shared):
            leave_home(module)
    for n in names:
        handle.set(n, None)
        handle.shared.pop(n, None)
        handle.parts.pop(n)
        del handle.integrators[n], handle.reports[n]
    if not handle.integrators:
        frozen = set(handle.frozen)
        for path, p in model.named_parameters():
            if base_name(path) in frozen:
                p.requires_grad_(True)
        for module in model.modules():
            if module.__dict__.get(_HANDLE) is handle:
                del module.__dict__[_HANDLE]
    return count


def train_inserted(model: nn.Module) -> int:
    """Let the inserted modules take gradients again, after peft froze them with all else; returns their parameters."""
    if handle_of(model) is None:
        raise ValueError(f"nothing was inserted into this {type(model).__name__}")
    count = 0
    for _, module in attached(model):
        for p in module.parameters():
            p.requires_grad_(True)
            count += p.numel()
    return count


def handle_of(model: nn.Module) -> Inserted | None:
    """The one handle of all that was inserted into the model, wherever in it."""
    return next((m._vlkernels_context for m in model.modules() if is_host(m)), None)


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The inserted modules with their paths."""
    handle = handle_of(model)
    names = {PREFIX + n for n in handle.integrators} if handle is not None else set()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            yield path, module


def base_name(path: str) -> str:
    """A parameter's path as it is without wrappers of peft, compile and sharding."""
    for part in _WRAPPERS:
        path = path.replace(part, "")
    return path.removeprefix("base_model.model.")


def made_like(layer: nn.Module, device, dtype) -> dict:
    """Device and dtype of new parameters: of the layer's first floating one, for a quantised weight has neither."""
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    if like is None:
        like = torch.empty((), device=next(layer.parameters()).device)
    if device is None and like.device.type == "meta":
        raise ValueError("the layer's parameters are elsewhere (offloaded?); accepted: device= for the new ones")
    return {"device": device or like.device, "dtype": dtype or like.dtype}


def _chosen(found: list[Stack], integrator: Integrator) -> list[Stack]:
    if len(found) == 1 or integrator.stack == "both":
        return found
    return [s for s in found if s.name == integrator.stack]


def _layers(layers, stack: Stack, integrator: Integrator) -> list[int]:
    count = len(stack.layers)
    if layers is None:
        return integrator.layers_of(stack)
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers or any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
        raise TypeError(f"layers is {layers!r}; accepted: a number, or numbers, of layers")
    outside = [n for n in numbers if not 0 <= n < count]
    if outside or len(set(numbers)) < len(numbers):
        what = f"{outside} of it out of range" if outside else "a number of it twice"
        raise ValueError(
            f"layers is {layers!r}, {what}; accepted: different numbers from 0 to {count - 1} ({stack.path})"
        )
    return sorted(numbers)


def _host_problem(module: nn.Module) -> str | None:
    """Why the module cannot be given another class, or None."""
    if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
        return "it is sharded; accepted: insert, then shard"
    if is_host(module):
        return None
    if any("vlkernels_fused" in vars(c) for c in type(module).__mro__):
        return "its class is a fused one; accepted: unswap, insert, then swap"
    # accelerate's hook calls a bound forward, which set_class binds anew
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "the instance carries a forward of its own, which a class cannot replace"
    return None


def _become_host(module: nn.Module, handle: Inserted, carries: bool, name: str) -> None:
    if not is_host(module):
        set_class(module, host_class(type(module)))
        module._vlkernels_context, module._vlkernels_carries = handle, carries
        module._vlkernels_parts, module._vlkernels_for = [], []
    module._vlkernels_carries = module._vlkernels_carries or carries
    if name not in module._vlkernels_for:
        module._vlkernels_for.append(name)


def _home(model: nn.Module, stack: Stack) -> nn.Module:
    """The module that owns the stack's layers, where what they share is attached."""
    return follow(model, stack.path.rpartition(".")[0])


def _freeze(model: nn.Module, base: list[tuple[str, nn.Parameter]], kept: list) -> list[tuple[str, nn.Parameter]]:
    kept = {id(p) for p in kept} | {id(p) for p in peft_parameters(model)}
    kept |= {id(p) for _, m in attached_parts(model) for p in m.parameters()}
    frozen = [(path, p) for path, p in base if p.requires_grad and id(p) not in kept]
    for _, p in frozen:
        p.requires_grad_(False)
    return frozen


def attached_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children called vlkernels_<name>, of a handle that may still be in the making."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2].startswith(PREFIX):
            yield path, module


def peft_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What peft trains: adapters, and copies of modules_to_save."""
    for module in model.modules():
        for name in (*getattr(module, "adapter_layer_names", ()), "modules_to_save", "prompt_encoder"):
            child = getattr(module, name, None)
            if isinstance(child, nn.Module):
                yield from child.parameters()
            elif isinstance(child, nn.Parameter):
                yield child
