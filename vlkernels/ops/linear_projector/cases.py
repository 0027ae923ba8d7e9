"""Shapes of linear_projector, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._device import arch


def _case(name, T, C, N, tags=(), recipe="", **options) -> Case:
    """T rows of y; C channels of x before the shuffle."""
    return Case(name, {"T": T, "C": C, "N": N}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    _case("everything", 36, 12, 40, norm="layer", shuffle=2, norm_bias=True, bias=True,
          tags=("all-precisions", "sharp")),
    _case("gemma", 33, 40, 24, norm="rms", norm_offset=1.0, eps=1e-6, tags=("all-precisions",)),
    _case("shuffle", 36, 10, 17, shuffle=3),
    _case("frozen", 20, 24, 40, norm="layer", frozen=True),
    _case("gemma-3-4b B16", 4096, 1152, 2560, norm="rms", norm_offset=1.0, eps=1e-6, tags=("bench",),
          recipe="Gemma 3 4B, 16 images of 256 tokens"),
    _case("ln-shuffle B16", 4096, 1152, 4096, norm="layer", norm_bias=True, shuffle=2, tags=("bench",),
          recipe="16 images of 32 x 32 patches"),
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of linear_projector; every additive term is at least 30 % of the output's scale."""
    T, C, N = (case[d] for d in "TCN")
    s, norm, trained = case.get("shuffle", 1), case.get("norm", "none"), not case.get("frozen", False)
    K = C * s * s
    return {
        "x": make.normal(*((1, 2 * s, T // 2 * s, C) if s > 1 else (T, C)), grad=True),
        "weight": make.normal(N, K, std=K**-0.5, grad=trained, wide=False),
        "bias": make.normal(N, grad=trained) if case.get("bias") else None,
        "norm_weight": make.normal(K, grad=trained) if norm != "none" else None,
        "norm_bias": make.normal(K, grad=trained) if case.get("norm_bias") else None,
        "norm": norm,
        "eps": case.get("eps", 1e-5),
        "norm_offset": case.get("norm_offset", 0.0),
        "shuffle": s,
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x, rounded to what the shuffle needs."""
    x, s = kw["x"].detach(), kw["shuffle"]
    cut = x[:, :, : rows * s] if s > 1 else x[:rows]
    return kw | {"x": cut.contiguous().requires_grad_(kw["x"].requires_grad)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "bias dropped": _scaled("bias", 0.0),
    "norm_bias halved": _scaled("norm_bias", 0.5),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "an offset": lambda kw: kw | {"norm_offset": kw["norm_offset"] + 1.0},
    "no norm": lambda kw: kw | {"norm": "none", "norm_weight": None, "norm_bias": None},
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    product = 2 * case["T"] * case["C"] * case.get("shuffle", 1) ** 2 * case["N"]
    return {"forward": product, "backward": product * (1 if case.get("frozen") else 2)}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    T, N, K = case["T"], case["N"], case["C"] * case.get("shuffle", 1) ** 2
    return {
        "forward": itemsize * (T * K + N * K + T * N),
        "backward": itemsize * (T * N + 2 * T * K + N * K * (1 if case.get("frozen") else 2)),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, N, e = case["T"], case["N"], itemsize
    s, norm, trained = case.get("shuffle", 1), case.get("norm", "none"), not case.get("frozen", False)
    K, bias = case["C"] * s * s, bool(case.get("bias"))
    affine, stats = (norm != "none") + bool(case.get("norm_bias")), 8 * T * (norm != "none")
    normed = 0 if norm == "none" and s == 1 else e * (2 * T * K + affine * K) + stats
    product = e * (T * K + N * K + T * N)

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    backward = product
    if trained:
        backward += product + normed
        if bias:
            backward += e * T * N + 4 * N + cast(N)
    if norm != "none" or s > 1:
        backward += 2 * e * T * K
    if norm != "none":
        backward += e * (T * K + K) + stats
        if K > _norm.TOGETHER and trained:
            backward += 2 * e * T * K + stats
        if trained:
            programs = _norm.config(T, K, arch(torch.empty(0))).programs
            backward += 4 * K * ((2 + affine) * programs + affine) + affine * cast(K)
    return {"forward": normed + product + e * bias * N, "backward": backward}
