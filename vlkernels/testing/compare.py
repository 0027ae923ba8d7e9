"""The rule for correctness: max |kernel - exact| <= 2 max |same-dtype reference - exact| + 4 ulp at the output's scale.

Exact is the reference in float64. The reference's error and the scale are taken over five seeds, because the largest of
one seed's rounding errors is itself a random number.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..op import Op
from .case import Case, Make, Precision

SEEDS = range(5)


@dataclass(frozen=True)
class Error:
    """The worst error of one output or gradient against its limit, and where it sits."""

    name: str
    error: float
    limit: float
    baseline: float
    scale: float
    where: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"{self.name}: error {self.error:.3g} at {self.where}, limit {self.limit:.3g} "
            f"(reference {self.baseline:.3g}, scale {self.scale:.3g}) {verdict}"
        )


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at `scale`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(scale)) if scale > info.tiny else info.tiny * info.eps


def cases_of(op: Op):
    """The op's cases module."""
    return importlib.import_module(op.reference.__package__ + ".cases")


def run(op: Op, arguments: dict, precision: Precision, backend: str, seed: int) -> dict[str, Tensor]:
    """Outputs and gradients of one call, for a cotangent drawn from `seed`."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    device = next(v.device for v in arguments.values() if isinstance(v, Tensor))
    with torch.autocast(device.type, precision.autocast or torch.bfloat16, enabled=precision.autocast is not None):
        y = op(**(arguments | leaves), backend=backend)
    outputs = (y,) if isinstance(y, Tensor) else y
    torch.autograd.backward(outputs, [cotangent(out, precision, seed, i) for i, out in enumerate(outputs)])
    results = {f"y{i or ''}": out.detach() for i, out in enumerate(outputs)}
    return results | {"d" + name: leaf.grad for name, leaf in leaves.items()}


def exact(op: Op, arguments: dict, precision: Precision, seed: int) -> dict[str, Tensor]:
    """The same call on the float64 reference, from the same rounded numbers and the same cotangent."""
    return run(op, {k: doubled(v) for k, v in arguments.items()}, precision, "reference", seed)


def cotangent(out: Tensor, precision: Precision, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + index + 17)
    return torch.randn(out.shape, generator=generator).to(out.device, precision.compute).to(out.dtype)


def doubled(v):
    return v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) and v.is_floating_point() else v


@functools.lru_cache(maxsize=64)
def limits(op: Op, case: Case, precision: Precision, device: str = "cpu") -> dict[str, tuple[float, float, float]]:
    """For each output and gradient: (limit, the reference's own error, the scale), over five seeds."""
    module = cases_of(op)
    baseline: dict[str, float] = {}
    scale: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    for seed in SEEDS:
        arguments = module.inputs(case, Make(precision, seed, device))
        truth = exact(op, arguments, precision, seed)
        for name, value in run(op, arguments, precision, "reference", seed).items():
            dtypes[name] = value.dtype
            baseline[name] = max(baseline.get(name, 0.0), worst(value, truth[name])[0])
            scale[name] = max(scale.get(name, 0.0), float(truth[name].abs().max()) if truth[name].numel() else 0.0)
    return {n: (2 * baseline[n] + 4 * ulp(scale[n], dtypes[n]), baseline[n], scale[n]) for n in baseline}


def errors(
    op: Op,
    case: Case,
    precision: Precision,
    backend: str,
    device: str = "cpu",
    wide: bool = False,
    change: Callable[[dict], dict | None] | None = None,
) -> list[Error]:
    """The errors of `backend` on one case; `change` edits the kernel's arguments only, to see that the rule notices."""
    arguments = cases_of(op).inputs(case, Make(precision, 0, device, wide))
    # a wide buffer draws other numbers, so its truth is its own; error and scale hold for any draw
    truth = exact(op, arguments, precision, 0)
    changed = arguments if change is None else change(arguments)
    got = run(op, changed, precision, backend, 0)
    found = []
    for name, (limit, baseline, scale) in limits(op, case, precision, device).items():
        value = got.get(name)
        if value is None or value.shape != truth[name].shape:
            found.append(Error(name, math.inf, limit, baseline, scale, ()))
            continue
        error, where = worst(value, truth[name])
        found.append(Error(name, error, limit, baseline, scale, where))
    return found


def worst(value: Tensor, truth: Tensor) -> tuple[float, tuple[int, ...]]:
    if value.numel() == 0:
        return 0.0, ()
    difference = (value.double() - truth).abs().flatten()
    bad = difference.isnan()
    index = int(bad.to(torch.uint8).argmax() if bad.any() else difference.argmax())
    where = torch.unravel_index(torch.tensor(index), truth.shape)
    return float(difference[index]), tuple(int(i) for i in where)


def beside(name: str, got: Tensor, usual: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> Error:
    """The rule for one tensor of a whole model, from one seed: `got` beside what stock code gives in the same dtypes.

    dtype: the one that was computed in, where the tensor's own is wider (autocast).
    """
    got, usual, exact = got.detach(), usual.detach(), exact.detach()
    if got.shape != exact.shape or got.dtype != usual.dtype:
        return Error(name, math.inf, 0.0, 0.0, 0.0, ())
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    baseline = worst(usual, exact)[0]
    error, where = worst(got, exact)
    return Error(name, error, 2 * baseline + 4 * ulp(scale, dtype or got.dtype), baseline, scale, where)


def model_errors(
    got: dict[str, Tensor], draws: Iterable[tuple[dict, dict]], dtype: torch.dtype | None = None, dtypes: bool = True
) -> list[Error]:
    """The rule for a whole model: its outputs, named "y...", and gradients, all by name.

    draws: (usual, exact) of each of five draws of parameters and inputs: what stock code gives in the same dtypes, and
    in float64. The first is `got`'s own; baseline and scale are the largest of all: one draw's are a matter of luck.
    Rounding in one place of a model reaches many gradients at once, so their baseline is the largest relative one.
    dtype: the one that was computed in, where the tensors' own is wider (autocast). dtypes: ask for the usual ones.

    A gradient that is zero in exact arithmetic (of a key's bias: it moves all scores alike) holds the rounding of
    others: it is held to the scale of the largest gradient.
    """
    baseline, scale = dict.fromkeys(got, 0.0), dict.fromkeys(got, 0.0)
    first: dict[str, Tensor] = {}
    for usual, exact_ in draws:
        assert got.keys() == usual.keys() == exact_.keys(), set(got) ^ set(usual) | set(got) ^ set(exact_)
        first = first or exact_
        for name, truth in exact_.items():
            assert usual[name].shape == truth.shape, name
            assert not dtypes or usual[name].dtype == got[name].dtype, name
            baseline[name] = max(baseline[name], worst(usual[name].detach(), truth.detach())[0])
            scale[name] = max(scale[name], float(truth.detach().abs().max()) if truth.numel() else 0.0)
    gradients = [name for name in scale if not name.startswith("y")]
    top = max((scale[name] for name in gradients), default=0.0)
    zero = {name for name in gradients if scale[name] <= 2**-30 * top}
    relative = max((baseline[name] / scale[name] for name in gradients if name not in zero), default=0.0)
    for name in gradients:
        baseline[name] = baseline[name] if name in zero else relative * scale[name]
    found = []
    for name, truth in first.items():
        limit = 2 * baseline[name] + 4 * ulp(top if name in zero else scale[name], dtype or got[name].dtype)
        same = got[name].shape == truth.shape
        error, where = worst(got[name].detach(), truth.detach()) if same else (math.inf, ())
        found.append(Error(name, error, limit, baseline[name], scale[name], where))
    return found


def assert_model(
    got: dict[str, Tensor],
    draws: Iterable[tuple[dict, dict]],
    dtype: torch.dtype | None = None,
    judged: Callable[[str], bool] = lambda name: True,
    dtypes: bool = True,
) -> None:
    """model_errors of all `judged` names are within the rule."""
    wrong = [str(error) for error in model_errors(got, draws, dtype, dtypes) if not error.ok and judged(error.name)]
    assert not wrong, "\n".join(wrong)
