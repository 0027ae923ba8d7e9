"""Shapes of gated_residual, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._device import arch
from .triton import TOGETHER, config


def _case(name, T, C, gates=1, inner=0, tags=(), recipe="", **options) -> Case:
    """T rows of C channels. inner: width of a branch that is a product, 0 for one that is given."""
    dims = {"T": T, "C": C} | ({"I": inner} if inner else {})
    return Case(name, dims, {"gates": gates, **options}, frozenset(tags), recipe)


# bf16+fp32: the stream, the gate and the norm in float32, the branch from a linear under autocast
PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32")

CASES = (
    # the one that compiles and the like run on: no program for each row
    _case("product", 33, 20, gates=20, inner=12, norm="rms", mask=True, tags=("all-precisions", "sharp")),
    # every term at once
    _case("everything", 11, 20, gates=4, norm="layer", bias=True, mask=True, p=0.25, tags=("all-precisions", "sharp")),
    _case("one gate", 13, 30, tags=("all-precisions",)),
    _case("product, one gate", 9, 24, inner=10),
    _case("raw gate of each channel", 11, 24, gates=24, tanh=False, mask=True),
    _case("wide", 3, 4200, norm="layer", bias=True),
    _case("openflamingo-9b B8", 2048, 4096, inner=512, tags=("bench",),
          recipe="OpenFlamingo-9B's attention branch, 8 samples of 256 tokens"),
    _case("idefics-9b B4", 2048, 4096, gates=4096, norm="rms", p=0.1, tags=("bench",),
          recipe="IDEFICS with a vector of gates and dropout, then the next norm"),
    _case("mllama-11b", 2048, 4096, mask=True, tags=("bench",), recipe="Mllama's feed-forward branch"),
    _case("llama-adapter B8", 4096, 4096, gates=32, tags=("bench",), recipe="a gate for each of 32 heads"),
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of gated_residual; every additive term is at least 30 % of the output's scale."""
    T, C, I, G, norm = case["T"], case["C"], case.dims.get("I", 0), case.get("gates"), case.get("norm", "none")  # noqa: E741
    kw = {
        "x": make.normal(T, C, role="adapter", grad=True),
        "gate": (make.normal(G, role="adapter").abs() + 0.5).requires_grad_(),
        "branch": None if I else make.normal(T, C, grad=True),
        "inner": make.normal(T, I, grad=True) if I else None,
        "weight": make.normal(C, I, std=I**-0.5, grad=True, wide=False) if I else None,
        "row_mask": make.rows(T, 4) > 0 if case.get("mask") else None,
    }
    affine = norm != "none"
    kw["norm_weight"] = make.normal(C, role="adapter", grad=True) if affine else None
    kw["norm_bias"] = make.normal(C, role="adapter", grad=True) if affine and case.get("bias") else None
    kw["seed"] = make.seed() if case.get("p") else None
    return kw | {"tanh": case.get("tanh", True), "norm": norm, "p": case.get("p", 0.0)}


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows."""
    cut = {n: kw[n].detach()[:rows].contiguous().requires_grad_(kw[n].requires_grad)
           for n in ("x", "branch", "inner") if kw[n] is not None}  # fmt: skip
    return kw | cut | {"row_mask": None if kw["row_mask"] is None else kw["row_mask"][:rows].clone()}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw.get(name) is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "branch dropped": _scaled("branch", 0.0),
    "product halved": _scaled("inner", 0.5),
    "gates turned": lambda kw: kw | {"gate": kw["gate"].detach().flip(0)},
    "no tanh": lambda kw: kw | {"tanh": False},
    "mask dropped": lambda kw: kw | {"row_mask": None},
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "another mask": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["seed"] is not None else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    product = 2 * case["T"] * case["C"] * case.dims.get("I", 0)
    return {"forward": product, "backward": 2 * product}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once; x's gradient is y's without a norm."""
    T, C, I, e = case["T"], case["C"], case.dims.get("I", 0), itemsize  # noqa: E741
    norm, source = case.get("norm", "none") != "none", T * I + C * I if I else T * C
    return {
        "forward": e * (2 * T * C + source + norm * T * C),
        "backward": e * (T * C + 2 * source + norm * 3 * T * C),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, C, I, e, G = case["T"], case["C"], case.dims.get("I", 0), itemsize, case.get("gates")  # noqa: E741
    norm, mask, seed = case.get("norm", "none") != "none", T * bool(case.get("mask")), 8 * bool(case.get("p"))
    affine, stats = norm + bool(case.get("bias")), 8 * T * norm
    tanh, programs = case.get("tanh", True), config(T, C, arch(torch.empty(0))).programs

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    # what follows from the sums of tanh(gate): a sum over the group, and the derivative in five small operators
    gates = 4 * (C if I or G > 1 else 1) + 4 * G + tanh * (cast(G) + 4 * 9 * G) + cast(G)
    if not I:
        forward = 3 * e * T * C + e * G + mask + seed + norm * e * T * C + affine * e * C + stats
        backward = 3 * e * T * C + mask + seed + e * G  # dy, branch, dbranch
        sums = 1 if G == 1 else C
        backward += 4 * sums * (2 * programs + 1) + gates
        if norm:
            backward += 3 * e * T * C + stats + e * C  # dn, y, dx
            backward += (C > TOGETHER) * (2 * e * T * C + stats)
            backward += 4 * C * ((2 + affine) * programs + affine) + affine * cast(C)
        return {"forward": forward, "backward": backward}
    scaled = 2 * e * C * I + e * G
    masked = (2 * e * T * I + 2 * mask) * bool(mask) + mask  # the comparison, then the filling
    forward = scaled + masked + e * (2 * T * C + T * I + C * I)
    backward = scaled + masked + e * (T * C + C * I + T * I) + e * (T * C + T * I + C * I)
    backward += bool(mask) * (2 * e * T * I + 3 * mask)  # in place
    backward += 3 * e * C * I + e * G + 4 * C + gates
    if norm:
        tiles = _norm.config(T, C, arch(torch.empty(0)))
        forward += 2 * e * T * C + affine * e * C + stats
        backward += 4 * e * T * C + e * C + stats
        backward += 4 * C * ((2 + affine) * tiles.programs + affine) + affine * cast(C)
    return {"forward": forward, "backward": backward}
