"""Shapes of pooled_mlp, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._device import arch
from .triton import config


def _case(name, B, H, W, P, Q, C, F, N, tags=(), recipe="", **options) -> Case:
    """B maps of H x W tokens, T tokens in all, that are pooled to P x Q."""
    dims = {"T": B * H * W, "H": H, "W": W, "P": P, "Q": Q, "C": C, "F": F, "N": N}
    return Case(name, dims, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # every term at once, in windows that overlap
    _case("everything", 3, 5, 4, 3, 2, 20, 24, 18, tags=("all-precisions", "sharp")),
    _case("halves", 2, 4, 6, 2, 3, 12, 20, 16, act="silu"),
    _case("larger", 2, 3, 2, 5, 4, 12, 20, 8, level=1),
    _case("no bias", 1, 9, 9, 4, 12, 10, 140, 8, bias=False, act="relu"),
    _case("frozen x", 2, 4, 4, 2, 2, 12, 20, 8, frozen_x=True, level=1),
    _case("frozen weights", 2, 4, 4, 2, 2, 12, 20, 8, frozen=True),
    _case("ldpv2 B16", 16, 24, 24, 12, 12, 1024, 2048, 2048, frozen_x=True, tags=("bench",),
          recipe="MobileVLM V2 1.7B's LDPv2, 16 images"),
    _case("ldpv2 B16 level1", 16, 24, 24, 12, 12, 1024, 2048, 2048, frozen_x=True, level=1, tags=("bench",),
          recipe="MobileVLM V2 1.7B's LDPv2, 16 images"),
)  # fmt: skip


def grid(case: Case) -> tuple[int, int, int, int, int]:
    """B, h, w, out_h, out_w; of fewer tokens than a map has, one narrow map with these."""
    T, h, w = case["T"], case["H"], case["W"]
    if T % (h * w) == 0:
        return T // (h * w), h, w, case["P"], case["Q"]
    w = next(n for n in (8, 4, 2, 1) if T % n == 0)
    return 1, T // w, w, max(1, T // w // 2), max(1, w // 2)


def inputs(case: Case, make: Make) -> dict:
    """Arguments of pooled_mlp; every additive term is at least 30 % of the output's scale."""
    (B, h, w, out_h, out_w), C, F, N = grid(case), *(case[d] for d in "CFN")
    bias, trained = case.get("bias", True), not case.get("frozen", False)
    return {
        "x": make.normal(B, h * w, C, grad=not case.get("frozen_x")),
        "w1": make.normal(F, C, std=C**-0.5, grad=trained, wide=False),
        "w2": make.normal(N, F, std=2 * F**-0.5, grad=trained, wide=False),
        "h": h,
        "w": w,
        "out_h": out_h,
        "out_w": out_w,
        "b1": make.normal(F, grad=trained) if bias else None,
        "b2": make.normal(N, grad=trained) if bias else None,
        "act": case.get("act", "gelu"),
        "level": case.get("level", 0),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on fewer images, one for each ten rows."""
    images = max(min(rows, 1), rows // 10)
    return kw | {"x": kw["x"].detach()[:images].contiguous().requires_grad_(kw["x"].requires_grad)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "b1 dropped": _scaled("b1", 0.0),
    "b2 halved": _scaled("b2", 0.5),
    "another activation": lambda kw: kw | {"act": "relu" if kw["act"] != "relu" else "silu"},
    "rows for columns": lambda kw: kw | {"h": kw["w"], "w": kw["h"]},
    "pooled otherwise": lambda kw: kw | {"out_h": kw["out_w"], "out_w": kw["out_h"]},
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    (B, h, w, out_h, out_w), C, F, N = grid(case), *(case[d] for d in "CFN")
    first, second = 2 * B * h * w * C * F, 2 * B * out_h * out_w * F * N
    trained, need_x = not case.get("frozen", False), not case.get("frozen_x")
    backward = second * (1 + trained) + first * (trained + need_x + bool(case.get("level")))
    return {"forward": first + second, "backward": backward}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    (B, h, w, out_h, out_w), C, F, N = grid(case), *(case[d] for d in "CFN")
    x, y, pre = B * h * w * C, B * out_h * out_w * N, B * h * w * F * (1 - case.get("level", 0))
    weights, dx = F * C + N * F, 0 if case.get("frozen_x") else x
    return {"forward": itemsize * (x + weights + pre + y), "backward": itemsize * (x + y + pre + 2 * weights + dx)}


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    (B, h, w, out_h, out_w), C, F, N, e = grid(case), *(case[d] for d in "CFN"), itemsize
    T, M, bias, trained = B * h * w, B * out_h * out_w, case.get("bias", True), not case.get("frozen", False)
    tiles = config(T, F, arch(torch.empty(0)))

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    first = e * (T * C + F * C + T * F + bias * F)
    pool = e * (T * F + M * F)
    forward = first + pool + e * (M * F + N * F + M * N + bias * N)
    backward = first if case.get("level") else 0
    if trained:
        backward += pool + e * (M * N + M * F + N * F)
        backward += e * (T * F + T * C + F * C)
        if bias:
            backward += e * M * N + 4 * N + cast(N) + 4 * F * (2 * tiles.splits + 1) + cast(F)
    backward += e * (M * N + N * F + M * F) + e * (2 * T * F + M * F)
    if not case.get("frozen_x"):
        backward += e * (T * F + F * C + T * C)
    return {"forward": forward, "backward": backward}
