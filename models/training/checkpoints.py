"""One safetensors file per finished stage: the tensors it trained, and what they belong to.

The key in the file's header is a digest of everything that the stage depends on (its declaration, its backbones, the
seed, the stages before it), so that a file is never taken for another run's. The digest of the contents is there
because safetensors itself checks sizes only.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1  # raise it when the meaning of a stage changes without its declaration changing


class Unusable(Exception):
    """The file is there but cannot be used; the message says why."""


def key(*parts: Any) -> str:
    """16 hexadecimal digits that stand for JSON-like values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:16]


def save(path: Path, module: nn.Module, names: list[str], belongs_to: str, facts: Mapping[str, Any]) -> None:
    """Write the named parameters of `module`; an interrupted write leaves no file under `path`."""
    from safetensors.torch import save_file

    parameters = dict(module.named_parameters())
    tensors = {name: parameters[name].detach().cpu().contiguous() for name in names}
    header = {"key": belongs_to, "contents": _digest(tensors), "facts": json.dumps(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def load(path: Path, module: nn.Module, names: list[str], belongs_to: str) -> dict[str, Any]:
    """Read the named parameters into `module` and return the stored facts.

    Raises: Unusable when the file is damaged, or belongs to another configuration; `module` is then unchanged.
    """
    from safetensors import SafetensorError, safe_open

    parameters = dict(module.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file handle, not a dict)
    except (SafetensorError, OSError) as error:
        raise Unusable(f"it is no readable safetensors file ({error})") from error
    if header.get("key") != belongs_to:
        raise Unusable(f"it belongs to another configuration (key {header.get('key')}, expected {belongs_to})")
    if set(tensors) != set(names):
        raise Unusable(f"it holds {len(tensors)} tensors of other names than the {len(names)} expected")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise Unusable(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}")
    if header.get("contents") != _digest(tensors):
        raise Unusable("its contents do not match their digest")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return json.loads(header["facts"])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
