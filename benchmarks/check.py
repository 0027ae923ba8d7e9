"""Correctness before any figure: the rule of vlkernels.testing.compare for every provider, with the timed tiles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from unittest import mock

import torch

from vlkernels.op import Op
from vlkernels.ops import _nf4_triton
from vlkernels.testing import compare
from vlkernels.testing.case import Case, Make, Precision

from .providers import Provider

# a multiple of 16, so that the kernels checked are specialised as the timed ones, and of no larger tile
ROWS = 208


@contextlib.contextmanager
def plan_of(op: Op, case: Case) -> Iterator[None]:
    """Inside, the op's kernels on fewer rows take the tiles that config(dims, ...) picks for all rows of the case.

    An op whose config takes no dims with a T keeps the tiles of the few rows.
    """
    kernels = op.kernels["triton"]
    if isinstance(kernels, str):
        yield
        return
    kernels = getattr(kernels, "CONFIG_IN", kernels)
    config = kernels.config

    def full(dims, *rest, **named):
        if hasattr(dims, "T"):
            dims = dataclasses.replace(dims, T=case["T"])
        return config(dims, *rest, **named)

    # a 4-bit weight is dequantised in the product only where all rows of the case are few
    few = _nf4_triton.MAX_ROWS if case.dims.get("T", 0) <= _nf4_triton.MAX_ROWS else 0
    with mock.patch.object(kernels, "config", full), mock.patch.object(_nf4_triton, "MAX_ROWS", few):
        yield


def fewer_rows(case: Case, rows: int, **options) -> Case:
    """The case on `rows` rows at most, with other options where given."""
    dims = {**case.dims, "T": min(rows, case["T"])}
    return dataclasses.replace(case, dims=dims, options={**case.options, **options})


@functools.lru_cache(maxsize=256)
def checked_case(case: Case, with_dropout: bool) -> Case:
    """What a case is checked on; one object per case, because limits are cached by it."""
    return fewer_rows(case, ROWS, **({} if with_dropout or not case.get("p") else {"p": 0.0}))


def errors(op: Op, provider: Provider, case: Case, precision: Precision, device: str) -> list[compare.Error]:
    """Output and gradients of the provider against the float64 reference, each with its limit.

    A provider that draws a dropout mask of its own is compared at p = 0.
    """
    small = checked_case(case, provider.exact_dropout)
    arguments = compare.cases_of(op).inputs(small, Make(precision, 0, device))
    truth = compare.exact(op, arguments, precision, 0)
    with plan_of(op, case):
        instance = provider.build(small, arguments, precision)
        y = instance.forward()
        outputs = (y,) if isinstance(y, torch.Tensor) else y
        grads = instance.backward(y, tuple(compare.cotangent(out, precision, 0, i) for i, out in enumerate(outputs)))
    got = {f"y{i or ''}": out.detach() for i, out in enumerate(outputs)}
    got |= {"d" + name: grad for name, grad in zip(instance.leaves, grads, strict=True)}
    found = []
    for name, (limit, baseline, scale) in compare.limits(op, small, precision, device).items():
        if name not in got or got[name].shape != truth[name].shape:
            found.append(compare.Error(name, math.inf, limit, baseline, scale, ()))
        else:
            found.append(compare.Error(name, *_worst(got[name], truth[name], limit, baseline, scale)))
    return found


def _worst(value, truth, limit, baseline, scale) -> tuple:
    error, where = compare.worst(value, truth)
    return error, limit, baseline, scale, where


def failure(found: list[compare.Error]) -> str | None:
    """What is wrong, or None when every output and gradient is within its limit."""
    return "; ".join(str(e) for e in found if not e.ok) or None


def share_of_limit(found: list[compare.Error]) -> float:
    """The worst error as a share of its limit."""
    return max(e.error / e.limit for e in found)


def repeats(op: Op, backend: str, case: Case, precision: Precision, device: str) -> str | None:
    """None when two runs of forward and backward agree in every bit, else the names that differ."""
    arguments = compare.cases_of(op).inputs(case, Make(precision, 0, device))
    first, second = (compare.run(op, arguments, precision, backend, 0) for _ in range(2))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    return ", ".join(differing) or None
