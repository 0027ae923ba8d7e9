"""Shapes of conv_se_linear, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._conv import out_side
from .._depthwise import HELD_CHANNELS
from .._device import arch
from .kernels import out_config, product_config
from .triton import config


def _case(name, B, H, W, C, S, N, tags=(), recipe="", **options) -> Case:
    """B maps of H x W tokens, T tokens in all; C channels, S squeezed, N at the end."""
    return Case(name, {"T": B * H * W, "H": H, "W": W, "C": C, "S": S, "N": N}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")
_RELU = {"act": "hardswish", "se_act": "relu", "gate": "hardsigmoid"}  # MobileVLM's

CASES = (
    # every term at once; where shapes are dynamic, equal ones (3 images, a weight's 3 rows) would share a symbol
    _case("everything", 5, 2, 2, 24, 7, 20, in_norm=True, bias=True, shortcut=True, out_act="silu",
          tags=("all-precisions", "sharp")),
    _case("ldp stride 2", 2, 5, 4, 20, 8, 24, stride=2, bias=True, **_RELU),
    _case("ldp skip", 2, 4, 5, 32, 8, 32, bias=True, shortcut=True, own_shortcut=True, **_RELU),
    _case("level1", 2, 3, 2, 24, 6, 24, in_norm=True, bias=True, shortcut=True, out_act="silu", level=1),
    _case("no affine", 2, 3, 2, 12, 3, 8, affine=False),
    _case("frozen x", 2, 3, 2, 12, 3, 8, frozen_x=True, bias=True, in_norm=True),
    _case("frozen weights", 2, 2, 3, 12, 3, 8, frozen=True, bias=True, in_norm=True, shortcut=True),
    *(
        _case(name, 16, 24, 24, C, S, N, tags=("bench",) if name == "c-abstractor B16" else ("bench", "uncounted"),
              recipe=recipe, bias=True, **options)
        for name, C, S, N, recipe, options in (
            ("c-abstractor B16", 1024, 256, 1024, "Honeybee's C-Abstractor, first stage, 16 images",
             {"in_norm": True, "shortcut": True, "out_act": "silu"}),
            ("c-abstractor B16 level1", 1024, 256, 1024, "Honeybee's C-Abstractor, first stage, 16 images",
             {"in_norm": True, "shortcut": True, "out_act": "silu", "level": 1}),
            ("ldp 2560 B16", 2560, 640, 2560, "MobileVLM-2.7B's LDP, first block, 16 images",
             {"shortcut": True, "own_shortcut": True, **_RELU}),
        )
    ),
)  # fmt: skip


def grid(case: Case) -> tuple[int, int, int]:
    """B, h, w; of fewer tokens than a map has, one narrow map with these."""
    T, h, w = case["T"], case["H"], case["W"]
    if T % (h * w) == 0:
        return T // (h * w), h, w
    w = next(n for n in (8, 4, 2, 1) if T % n == 0)
    return 1, T // w, w


def inputs(case: Case, make: Make) -> dict:
    """Arguments of conv_se_linear; every additive term is at least 30 % of the output's scale."""
    (B, h, w), C, S, N, s = grid(case), case["C"], case["S"], case["N"], case.get("stride", 1)
    trained, affine, bias = not case.get("frozen", False), case.get("affine", True), case.get("bias", False)
    need_x = not case.get("frozen_x")

    def vector(width: int, wanted: bool = True):
        return make.normal(width, grad=trained) if wanted else None

    kw = {
        "x": make.normal(B, h * w, C, grad=need_x),
        "conv_weight": make.normal(C, 1, 3, 3, std=0.4, grad=trained, wide=False),
        "fc1_weight": make.normal(S, C, std=4 * C**-0.5, grad=trained, wide=False),
        "fc1_bias": vector(S),
        "fc2_weight": make.normal(C, S, std=2 * S**-0.5, grad=trained, wide=False),
        "fc2_bias": vector(C),
        "weight": make.normal(N, C, std=2 * C**-0.5, grad=trained, wide=False),
        "h": h,
        "w": w,
        "norm_weight": vector(C, affine),
        "norm_bias": vector(C, affine and bias),
        "out_norm_weight": vector(N, affine),
        "out_norm_bias": vector(N, affine and bias),
    }
    if case.get("in_norm"):
        kw |= {"in_norm": True, "in_norm_weight": vector(C, affine), "in_norm_bias": vector(C, affine and bias)}
    if case.get("own_shortcut"):
        kw["shortcut"] = kw["x"]
    elif case.get("shortcut"):
        kw["shortcut"] = make.normal(B, out_side(h, s) * out_side(w, s), N, grad=need_x)
    given = (("stride", 1), ("act", "silu"), ("se_act", "silu"), ("gate", "sigmoid"), ("out_act", "none"), ("level", 0))
    return kw | {n: case.get(n, d) for n, d in given}


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on fewer images, one for each ten rows."""
    images = max(min(rows, 1), rows // 10)
    cut = {n: kw[n].detach()[:images].contiguous().requires_grad_(kw[n].requires_grad)
           for n in ("x", "shortcut") if kw.get(n) is not None}  # fmt: skip
    return kw | cut


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw.get(name) is not None else None


def _without_corner(kw: dict) -> dict:
    weight = kw["conv_weight"].detach().clone()
    weight[..., 2, 0] = 0
    return kw | {"conv_weight": weight}


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "one tap dropped": _without_corner,
    "fc1_bias dropped": _scaled("fc1_bias", 0.0),
    "fc2_bias dropped": _scaled("fc2_bias", 0.0),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "in_norm_bias dropped": _scaled("in_norm_bias", 0.0),
    "out_norm_weight halved": _scaled("out_norm_weight", 0.5),
    "out_norm_bias dropped": _scaled("out_norm_bias", 0.0),
    "shortcut dropped": _scaled("shortcut", 0.0),
    "another gate": lambda kw: kw | {"gate": "sigmoid" if kw["gate"] != "sigmoid" else "hardsigmoid"},
    "another activation of the squeeze": lambda kw: kw | {"se_act": "relu" if kw["se_act"] != "relu" else "silu"},
    "another activation": lambda kw: kw | {"out_act": "relu" if kw["out_act"] != "relu" else "silu"},
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    (B, h, w), C, S, N, s = grid(case), case["C"], case["S"], case["N"], case.get("stride", 1)
    trained, level = not case.get("frozen", False), case.get("level", 0)
    product, squeeze = 2 * B * out_side(h, s) * out_side(w, s) * C * N, 4 * B * C * S
    backward = product * (1 + trained + (level == 1)) + squeeze * (2 + trained)
    return {"forward": product + squeeze, "backward": backward}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    (B, h, w), C, N, s, e = grid(case), case["C"], case["N"], case.get("stride", 1), itemsize
    rows, keeps = B * out_side(h, s) * out_side(w, s), case.get("level", 0) == 0
    x, inner, out, weights = B * h * w * C, rows * C, rows * N, N * C
    shortcut, dx = bool(case.get("shortcut")) * out, 0 if case.get("frozen_x") else x
    kept = keeps * (inner + out)
    return {
        "forward": e * (x + weights + shortcut + out + kept),
        "backward": e * (out + x + kept + 2 * weights + dx + 2 * shortcut),
    }


def _normed_bytes(x: int, C: int, e: int, rows: int, affine: int) -> int:
    """A norm's pass: x read, its result and statistics written."""
    return 2 * x + affine * e * C + 8 * rows


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    (B, h, w), C, S, N, s, e = grid(case), case["C"], case["S"], case["N"], case.get("stride", 1), itemsize
    trained, need_x, level = not case.get("frozen", False), not case.get("frozen_x"), case.get("level", 0)
    affine = case.get("affine", True) * (1 + bool(case.get("bias")))
    in_norm, shortcut = case.get("in_norm", False), bool(case.get("shortcut"))
    act_after = case.get("out_act", "none") != "none"
    tokens = out_side(h, s) * out_side(w, s)
    rows, device_arch = B * tokens, arch(torch.empty(0))
    tiles = config(B, h * w, tokens, C, True, device_arch)
    x, y, d = e * B * h * w * C, e * rows * C, e * rows * N
    stats, taps, per_channel = 8 * rows, e * 9 * C, e * C
    dtype = torch.float32 if e == 4 else torch.bfloat16

    turned = 2 * e * 9 * C * (tiles.forward.channels > HELD_CHANNELS)  # the weights' copy

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    inner = _normed_bytes(x, C, e, B * h * w, affine) if in_norm else 0

    def convolved(results: int) -> int:
        return x + turned + taps + affine * per_channel + stats + results * y

    # the means to the excitation: two products, and the activations' passes
    squeezed = cast(B * C) + e * (B * C + S * C + S + B * S) + 2 * e * B * S + e * (B * S + S * C + C + B * C)
    squeezed += 2 * e * B * C
    product = y + e * B * C + e * N * C + d
    if product_config(rows, N, C, dtype) is None:
        product += 2 * y
    forward = inner + convolved(1 + (level == 0)) + 4 * C * (2 * B * tiles.forward.chunks + 3 * B)
    forward += squeezed + product + 2 * d + affine * e * N + stats + shortcut * d

    backward = squeezed
    if trained or level == 1:
        backward += inner
    if level == 1:
        backward += convolved(2) + product
    # norm, shortcut and activation after the product
    programs = out_config(rows, N, device_arch)[2]
    needs_shortcut = shortcut and need_x
    backward += stats + 3 * d + needs_shortcut * d + (act_after and shortcut) * d
    backward += e * N * (affine if act_after else min(affine, 1))
    if trained and affine:
        backward += 4 * N * ((2 + affine) * programs + affine) + affine * cast(N)
    backward += d + e * N * C + y  # dd W
    backward += y + stats + affine * per_channel + e * B * C  # y again
    backward += 4 * C * (2 * B * tiles.forward.chunks + B) + y  # the sums of dys y
    if trained:
        backward += y + d + y + e * N * C  # y scale, dd's product with it
    # through the excitation
    gate = 4 * B * C * (3 + 3 + 2) + cast(B * C) if case.get("gate", "sigmoid") == "sigmoid" else None
    if gate is None:
        gate = B * C * (e + 1 + e + 1 + 3 + 8 + 1 + 8)
    backward += gate + cast(B * C)
    backward += e * (B * C + C * S + B * S) + 2 * cast(B * S)
    backward += 4 * B * S * (2 + 2 + 3 + 2 + 3 + 3) if case.get("se_act", "silu") == "silu" else B * S * (5 + 9)
    backward += cast(B * S) + e * (B * S + S * C + B * C) + cast(B * C)
    if trained:
        backward += 4 * (B * C + C + B * S + S) + cast(C + S)
        backward += e * (B * C + B * S + C * S) * 2
    # through activation and norm, and the taps
    backward += 2 * y + y + stats + affine * per_channel + (e + 4) * B * C
    if trained and affine:
        backward += 4 * C * ((2 + affine) * B * tiles.rows.chunks + affine) + affine * cast(C)
    need_dz = need_x or (trained and in_norm and affine)
    backward += y + taps + trained * x + need_dz * x
    if trained:
        backward += 4 * C * (19 * B * tiles.backward.chunks + 9) + cast(9 * C)
    if case.get("own_shortcut") and need_x:
        backward += 3 * x  # autograd adds both gradients of x
    if in_norm and need_dz:
        norm = _norm.config(B * h * w, C, device_arch)
        backward += 2 * x + need_x * x + 8 * B * h * w + affine * per_channel
        if trained and affine:
            backward += 4 * C * ((2 + affine) * norm.programs + affine) + affine * cast(C)
    return {"forward": forward, "backward": backward}
