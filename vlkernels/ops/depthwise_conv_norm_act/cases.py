"""Shapes of depthwise_conv_norm_act, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._conv import out_side
from .._depthwise import HELD_CHANNELS
from .._device import arch
from .triton import config


def _case(name, B, H, W, C, tags=(), recipe="", **options) -> Case:
    """B maps of H x W tokens, T tokens in all."""
    return Case(name, {"T": B * H * W, "H": H, "W": W, "C": C}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # every term at once; where shapes are dynamic, equal ones (3 images, a weight's 3 rows) would share a symbol
    _case("everything", 4, 5, 4, 24, bias=True, skip=True, norm_bias=True, act="silu", means=True,
          tags=("all-precisions", "sharp")),
    _case("stride 2", 2, 7, 6, 20, stride=2, norm_bias=True, act="hardswish", means=True, tags=("all-precisions",)),
    _case("peg", 2, 4, 6, 20, norm="none", bias=True, skip=True),
    _case("level1", 2, 5, 3, 12, act="silu", level=1, means=True),
    _case("one token", 3, 1, 1, 5, act="relu", norm_bias=True),
    _case("no norm, two blocks", 1, 5, 4, 140, norm="none", act="gelu", means=True),
    _case("wide", 1, 2, 2, 2100, norm_bias=True, act="silu"),
    _case("frozen x", 2, 4, 4, 12, frozen_x=True, bias=True, act="silu", norm_bias=True),
    _case("frozen weights", 2, 4, 5, 12, frozen=True, stride=2, act="hardswish", norm_bias=True),
    _case("c-abstractor B16", 16, 24, 24, 1024, norm_bias=True, act="silu", means=True, tags=("bench",),
          recipe="Honeybee's C-Abstractor, first stage, 16 images"),
    _case("c-abstractor B16 level1", 16, 24, 24, 1024, norm_bias=True, act="silu", means=True, level=1,
          tags=("bench", "uncounted"), recipe="Honeybee's C-Abstractor, first stage, 16 images"),
    _case("ldp B16", 16, 24, 24, 2560, stride=2, norm_bias=True, act="hardswish", means=True,
          tags=("bench", "uncounted"), recipe="MobileVLM-2.7B's LDP, second block, 16 images"),
    _case("ldpv2 B16", 16, 12, 12, 2048, norm="none", bias=True, skip=True, tags=("bench",),
          recipe="MobileVLM V2 1.7B's LDPv2, 16 images"),
)  # fmt: skip


def grid(case: Case) -> tuple[int, int, int]:
    """B, h, w; of fewer tokens than a map has, one narrow map with these."""
    T, h, w = case["T"], case["H"], case["W"]
    if T % (h * w) == 0:
        return T // (h * w), h, w
    w = next(n for n in (8, 4, 2, 1) if T % n == 0)
    return 1, T // w, w


def inputs(case: Case, make: Make) -> dict:
    """Arguments of depthwise_conv_norm_act; every additive term is at least 30 % of the output's scale."""
    (B, h, w), C = grid(case), case["C"]
    trained, norm = not case.get("frozen", False), case.get("norm", "layer")
    return {
        "x": make.normal(B, h * w, C, grad=not case.get("frozen_x")),
        "weight": make.normal(C, 1, 3, 3, std=0.4, grad=trained, wide=False),
        "h": h,
        "w": w,
        "bias": make.normal(C, grad=trained) if case.get("bias") else None,
        "norm_weight": make.normal(C, grad=trained) if norm != "none" else None,
        "norm_bias": make.normal(C, grad=trained) if case.get("norm_bias") else None,
        "norm": norm,
    } | {n: case.get(n, d) for n, d in (("stride", 1), ("skip", False), ("act", "none"), ("means", False),
                                        ("level", 0))}  # fmt: skip


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on fewer images, one for each ten rows."""
    images = max(min(rows, 1), rows // 10)
    return kw | {"x": kw["x"].detach()[:images].contiguous().requires_grad_(kw["x"].requires_grad)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


def _without_corner(kw: dict) -> dict:
    weight = kw["weight"].detach().clone()
    weight[..., 2, 0] = 0
    return kw | {"weight": weight}


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "one tap dropped": _without_corner,
    "bias dropped": _scaled("bias", 0.0),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "skip dropped": lambda kw: kw | {"skip": False} if kw["skip"] else None,
    "another activation": lambda kw: kw | {"act": "relu" if kw["act"] != "relu" else "silu"},
    "no norm": lambda kw: (
        kw | {"norm": "none", "norm_weight": None, "norm_bias": None} if kw["norm"] != "none" else None
    ),
    "rows for columns": lambda kw: kw | {"h": kw["w"], "w": kw["h"]},
}  # fmt: skip


def flops(case: Case) -> dict[str, int]:
    """Of the matrix products: there are none."""
    return {"forward": 0, "backward": 0}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    (B, h, w), C, s, e = grid(case), case["C"], case.get("stride", 1), itemsize
    x, y = B * h * w * C, B * out_side(h, s) * out_side(w, s) * C
    keeps = (case.get("norm", "layer") != "none" or case.get("act", "none") != "none") and not case.get("level", 0)
    dx = 0 if case.get("frozen_x") else x
    return {"forward": e * (x + y + keeps * y), "backward": e * (x + y + keeps * y + dx)}


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    (B, h, w), C, s, e = grid(case), case["C"], case.get("stride", 1), itemsize
    norm, act, means = case.get("norm", "layer") != "none", case.get("act", "none") != "none", case.get("means", False)
    trained, need_x, level = not case.get("frozen", False), not case.get("frozen_x"), case.get("level", 0)
    rows = B * out_side(h, s) * out_side(w, s)
    tiles = config(B, h * w, rows // B, C, norm, arch(torch.empty(0)))
    bias, beta = bool(case.get("bias")), bool(case.get("norm_bias"))
    affine = norm + beta
    x, y, stats, taps = e * B * h * w * C, e * rows * C, 8 * rows * norm, e * (9 + bias) * C

    turned = 2 * e * 9 * C * (tiles.forward.channels > HELD_CHANNELS)  # the weights' copy

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    def convolved(results: int) -> int:
        # a stride of 2 and a padding of 1 still read every token
        return x + turned + taps + affine * e * C + stats + results * y

    keeps = (norm or act) and level == 0
    forward = convolved(1 + keeps)
    if means:
        forward += 4 * C * (2 * B * tiles.forward.chunks + 3 * B)  # written, added up, divided

    backward = 0
    if (norm or act) and level == 1:
        backward += convolved(1)
    if norm or act or means:
        backward += 2 * y + (norm or act) * (y + stats + affine * e * C) + means * 4 * B * C
        if affine and trained:
            backward += 4 * C * ((2 + affine) * B * tiles.rows.chunks + affine) + affine * cast(C)
    if trained or need_x:
        backward += y + trained * x + need_x * x + e * 9 * C
        if trained:
            # ten partial sums are written, nine or ten are added up
            backward += 4 * C * ((19 + bias) * B * tiles.backward.chunks + 9 + bias) + cast((9 + bias) * C)
    return {"forward": forward, "backward": backward}
