"""Shapes of norm_residual, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._device import arch
from .triton import config


def _case(name, T, C, tags=(), recipe="", **options) -> Case:
    """T rows of C channels. norm: "layer" by default; bias: of the norm."""
    return Case(name, {"T": T, "C": C}, {"norm": "layer", **options}, frozenset(tags), recipe)


# bf16+fp32: the stream and the norm in float32, the branch from a linear under autocast
PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32")

CASES = (
    # every term at once
    _case("everything", 33, 52, p=0.25, bias=True, tags=("all-precisions", "sharp")),
    _case("no dropout", 17, 40, bias=True, tags=("all-precisions",)),
    _case("rms", 11, 24, norm="rms", p=0.1, eps=1e-6),
    _case("no norm", 13, 30, norm="none", p=0.5, tags=("all-precisions",)),
    _case("three axes", 15, 20, p=0.1, bias=True, images=3),
    _case("narrow", 10, 3, p=0.3, bias=True),
    _case("wide", 3, 4200, p=0.1, bias=True),
    _case("frozen norm", 9, 24, bias=True, frozen=True),
    _case("frozen x", 9, 24, p=0.1, bias=True, frozen_x=True),
    _case("no affine", 7, 24, affine=False, p=0.1),
    _case("q-former B100", 3200, 768, bias=True, p=0.1, eps=1e-12, tags=("bench",),
          recipe="BLIP-2's Q-Former, 100 images of 32 queries"),
    _case("mplug-owl B64", 4096, 1024, bias=True, eps=1e-6, tags=("bench",),
          recipe="mPLUG-Owl's abstractor, 64 images of 64 queries"),
    _case("bert B100 no norm", 3200, 768, norm="none", p=0.1, tags=("bench",),
          recipe="a residual sum before the norm, 100 images of 32 queries"),
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of norm_residual; every additive term is at least 30 % of the output's scale."""
    T, C, norm, p = case["T"], case["C"], case.get("norm"), case.get("p", 0.0)
    images, trained = case.get("images"), not case.get("frozen", False)
    shape = (T, C) if images is None else (images, T // images, C)
    affine = norm != "none" and case.get("affine", True)
    return {
        "x": make.normal(*shape, role="adapter", grad=not case.get("frozen_x")),
        "branch": make.normal(*shape, grad=True),
        "weight": make.normal(C, role="adapter", grad=trained) if affine else None,
        "bias": make.normal(C, role="adapter", grad=trained) if case.get("bias") else None,
        "seed": make.seed() if p else None,
        "norm": norm,
        "eps": case.get("eps", 1e-5),
        "p": p,
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x and the branch, of each image."""
    cut = {n: kw[n].detach()[..., :rows, :].contiguous().requires_grad_(kw[n].requires_grad) for n in ("x", "branch")}
    return kw | cut


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "branch dropped": _scaled("branch", 0.0),
    "branch halved": _scaled("branch", 0.5),
    "weight halved": _scaled("weight", 0.5),
    "bias dropped": _scaled("bias", 0.0),
    "no norm": lambda kw: kw | {"norm": "none", "weight": None, "bias": None} if kw["norm"] != "none" else None,
    "another norm": lambda kw: kw | {"norm": "rms", "bias": None} if kw["norm"] == "layer" else None,
    "another mask": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["seed"] is not None else None,
    "no dropout": lambda kw: kw | {"p": 0.0} if kw["p"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Of the matrix products: there are none."""
    return {"forward": 0, "backward": 0}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    T, C, e = case["T"], case["C"], itemsize
    need_x, norm = not case.get("frozen_x"), case.get("norm") != "none"
    return {"forward": 3 * e * T * C, "backward": e * T * C * (2 + need_x + norm)}


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, C, e = case["T"], case["C"], itemsize
    norm, need_x, trained = case.get("norm") != "none", not case.get("frozen_x"), not case.get("frozen", False)
    affine = (norm and case.get("affine", True)) + bool(case.get("bias"))
    seed, stats = 8 * bool(case.get("p")), 8 * T * norm
    sums = trained and affine > 0

    forward = 3 * e * T * C + affine * e * C + stats + seed

    backward = e * T * C * (2 + need_x) + seed  # dy, dbranch, dx
    if norm and (need_x or sums):
        backward += e * T * C + stats + need_x * e * C * (affine > 0)
    if C > _norm.TOGETHER and sums and need_x:
        backward += 2 * e * T * C + stats
    if sums:
        programs = config(T, C, arch(torch.empty(0))).programs
        backward += 4 * C * ((2 + affine) * programs + affine) + affine * C * (0 if e == 4 else 4 + e)
    return {"forward": forward, "backward": backward}
