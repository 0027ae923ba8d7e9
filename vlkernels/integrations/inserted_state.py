"""Save and load of what is trained: inserted modules, and base parameters that the user trains beside them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .insert import attached, base_name, handle_of, peft_parameters

_FORMAT = "vlkernels.inserted"


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """By name, as in the model without wrappers: tensors of inserted modules, and what else takes gradients.

    A tensor that several modules share stands under the first of its names."""
    if handle_of(model) is None:
        raise ValueError(f"nothing was inserted into this {type(model).__name__}")
    # a LoRA on an inserted linear is peft's to save
    seen = {id(p) for p in peft_parameters(model)}
    found: dict[str, Tensor] = {}
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for name, t in itertools.chain(_attached_tensors(model), trained):
        if id(t) not in seen:
            seen.add(id(t))
            found[base_name(name)] = t
    return found


def _attached_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in attached(model):
        for name, t in module.state_dict(keep_vars=True).items():
            yield f"{path}.{name}", t


def inserted_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of what `insert` added, and of base parameters that take gradients, by names without peft's prefixes.

    The base's frozen parameters and peft's adapters, which peft saves, are not in it. Raises ValueError where nothing
    was inserted.
    """
    return {name: t.detach() for name, t in _entries(model).items()}


def save_inserted(model: nn.Module, path: str | os.PathLike) -> None:
    """Write `inserted_state_dict` to a safetensors file, with the integrators' descriptions as its metadata."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in inserted_state_dict(model).items()}
    save_file(tensors, os.fspath(path), metadata={_FORMAT: json.dumps(descriptions(model))})


def descriptions(model: nn.Module) -> dict[str, str]:
    """What is inserted, by name."""
    return {name: repr(integrator) for name, integrator in handle_of(model).integrators.items()}


def load_inserted(model: nn.Module, source: dict[str, Tensor] | str | os.PathLike, *, strict: bool = True) -> list[str]:
    """Copy a state of `inserted_state_dict`, or a file of `save_inserted`, into a model with the same modules inserted.

    strict: names that are missing or left over are an error. Returns the names that were loaded. A state of base
    parameters that the user trained goes into the base, whether they take gradients here or not.
    Raises: ValueError naming what does not fit, with the description in the file; then nothing was copied.
    """
    told = ""
    if not isinstance(source, dict):
        from safetensors import safe_open

        with safe_open(os.fspath(source), framework="pt") as f:
            saved = json.loads((f.metadata() or {}).get(_FORMAT, "{}"))
            source = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (it is no dict)
        told = f"; the file holds {', '.join(saved.values())}" if saved else ""
    wanted = _entries(model)
    own = {base_name(name): t for name, t in _attached_tensors(model)}
    everything = {base_name(name): p for name, p in model.named_parameters(remove_duplicate=False)} | own
    reached = {id(everything[n]) for n in source if n in everything}
    missing = sorted(n for n, t in wanted.items() if n in own and id(t) not in reached)
    extra = sorted(n for n in source if n not in everything)
    wrong = [
        f"{n} has shape {tuple(source[n].shape)}, accepted {tuple(everything[n].shape)}"
        for n in source if n in everything and source[n].shape != everything[n].shape
    ]  # fmt: skip
    if wrong or (strict and (missing or extra)):
        reasons = [*wrong[:3]]
        if strict and missing:
            reasons.append(f"{len(missing)} names are missing ({', '.join(missing[:3])} ...)")
        if strict and extra:
            reasons.append(f"{len(extra)} names fit nothing ({', '.join(extra[:3])} ...)")
        raise ValueError(f"the state is of other modules than those inserted: {'; '.join(reasons)}{told}")
    loaded = [n for n in source if n in everything]
    with torch.no_grad():
        for n in loaded:
            everything[n].copy_(source[n])
    return loaded
