"""Goldens made from an equation, of settings that the recorded ones do not have."""

import json

import torch
from safetensors.torch import save_file

from vlkernels.testing import goldens


def write(folder, module_id, hp, parameters, inputs, equation, same=()) -> None:
    """A golden of the equation's numbers: equation(parameters under upstream's names, *inputs) -> y, or by name.

    same: groups of names that are one tensor, whose gradient is the sum over all of them.
    """
    torch.manual_seed(4)
    p = {n: (torch.randn(shape) * 0.4).requires_grad_() for n, shape in parameters.items()}
    for group in same:
        p |= dict.fromkeys(group, p[group[0]])
    x = {n: torch.randn(shape).requires_grad_() for n, shape in inputs.items()}
    out = equation(p, *x.values())
    out = {"y": out} if isinstance(out, torch.Tensor) else out
    cot = {n: torch.randn(y.shape) for n, y in out.items()}
    sum((out[n] * c).sum() for n, c in cot.items()).backward()
    tensors = {"param": p, "in": x, "out": out, "cot": cot}
    tensors["grad_param"] = {n: t.grad for n, t in p.items() if t.grad is not None}
    tensors["grad_in"] = {n: t.grad for n, t in x.items()}
    named = {f"{kind}.{n}": t.detach() for kind, of in tensors.items() for n, t in of.items()}
    flat = {n: t.clone(memory_format=torch.contiguous_format) for n, t in named.items()}
    metadata = {"module": module_id, "hyperparameters": json.dumps(hp), "kind": "own", "set": "own"}
    save_file(flat, folder / "own.safetensors", metadata)


def passes(folder) -> None:
    """Builder, names and numbers, gradients too."""
    (record,) = goldens.run_directory(folder, backend="reference")
    assert record.verdict == "passed" and record.gradients, record.message


def both(name, out, width):
    """Shapes of a linear's parameters."""
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
