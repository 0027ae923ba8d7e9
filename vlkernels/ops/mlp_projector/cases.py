"""Shapes of mlp_projector, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._device import arch
from .triton import config


def _case(name, T, C, F, N, tags=(), recipe="", **options) -> Case:
    """T rows of y; C channels of x before shuffle and merge."""
    return Case(name, {"T": T, "C": C, "F": F, "N": N}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    _case("llava", 70, 40, 136, 52, tags=("all-precisions",)),
    # every term at once, for a residual has neither shuffle nor merge in two cases
    _case("everything", 18, 12, 72, 40, act="silu", gated=True, norm="layer", shuffle=2, merge=2, norm_bias=True,
          tags=("all-precisions",)),
    _case("residual", 33, 40, 72, 40, act="silu", norm="layer", norm_bias=True, residual=True,
          tags=("all-precisions", "sharp")),
    _case("residual of no norm", 35, 24, 56, 24, bias=False, residual=True, tags=("all-precisions",)),
    _case("residual, own gate", 21, 24, 40, 24, act="silu", own_gate=True, norm="rms", bias=False, residual=True,
          level=1),
    # Flamingo's: behind a gate, which some rows do not pass
    _case("scaled residual", 33, 20, 40, 20, norm="layer", norm_bias=True, bias=False, residual=True, scale=True,
          mask=True, tags=("sharp",)),
    _case("scaled, own gate", 18, 24, 40, 24, act="silu", own_gate=True, norm="rms", bias=False, residual=True,
          scale=True, level=1),
    # GLM-4V's and CogVLM's: an activation after the norm, and a gate with a weight of its own
    _case("own-gate", 21, 24, 72, 40, act="silu", own_gate=True, norm="layer", norm_act="gelu", norm_bias=True,
          bias=False, tags=("all-precisions",)),
    _case("rms", 11, 24, 40, 24, act="gelu_tanh", norm="rms", bias=False, merge=4, eps=1e-6),
    _case("level1", 21, 24, 40, 24, norm="layer", level=1, act="quick_gelu"),
    _case("shuffle", 36, 10, 33, 17, shuffle=3, act="relu"),
    _case("many-rows", 130, 8, 24, 12),
    _case("wide-norm", 3, 4200, 16, 8, norm="layer", norm_bias=True),
    _case("frozen-x", 20, 24, 40, 24, frozen_x=True),
    _case("frozen-weights", 20, 24, 40, 24, norm="layer", frozen=True, act="gelu"),
    *(
        Case(name, dict(zip("TCFN", dims, strict=True)), options, frozenset({"bench"}), recipe)
        for name, dims, options, recipe in (
            ("llava-1.5-7b B16", (9216, 1024, 4096, 4096), {"frozen_x": True}, "LLaVA-1.5-7B, 16 images of 576 tokens"),
            ("llava-1.5-7b B16 level1", (9216, 1024, 4096, 4096), {"frozen_x": True, "level": 1}, "LLaVA-1.5-7B"),
            ("internvl B16", (4096, 1024, 4096, 4096), {"norm": "layer", "shuffle": 2, "norm_bias": True}, "InternVL"),
            ("qwen2-vl B16", (4096, 1280, 5120, 3584), {"norm": "layer", "merge": 4, "norm_bias": True}, "Qwen2-VL"),
            ("flamingo ffn B64", (4096, 1024, 4096, 1024), {"norm": "layer", "norm_bias": True, "bias": False,
                                                            "residual": True}, "OpenFlamingo's resampler, 64 images"),
            ("gated ffn of openflamingo-9b", (2048, 4096, 16384, 4096), {"norm": "layer", "norm_bias": True,
                                                                         "bias": False, "residual": True,
                                                                         "scale": True}, "OpenFlamingo-9B's FFN"),
            ("glm-4v B8", (4608, 1536, 4096, 1536), {"norm": "layer", "norm_bias": True, "norm_act": "gelu",
                                                     "act": "silu", "own_gate": True, "bias": False}, "GLM-4V"),
            ("aya B8", (1352, 1152, 14336, 8192), {"norm": "layer", "shuffle": 2, "gated": True, "act": "silu",
                                                   "norm_bias": True}, "Aya Vision"),
        )
    ),
)  # fmt: skip


def _inner(case: Case) -> int:
    """Columns of the first product."""
    return case["F"] * (2 if case.get("gated") or case.get("own_gate") else 1)


def inputs(case: Case, make: Make) -> dict:
    """Arguments of mlp_projector; every additive term is at least 30 % of the output's scale."""
    T, C, F, N = (case[d] for d in "TCFN")
    s, m, norm = case.get("shuffle", 1), case.get("merge", 1), case.get("norm", "none")
    gated, bias, trained = case.get("gated", False), case.get("bias", True), not case.get("frozen", False)
    K, inner = C * s * s * m, 2 * F if gated else F
    rows = T * m
    # a grid of two rows of tokens when the shuffle needs one
    x = make.normal(*((1, 2 * s, rows // 2 * s, C) if s > 1 else (rows, C)), grad=not case.get("frozen_x"))
    return {
        "x": x,
        "w1": make.normal(inner, K, std=K**-0.5, grad=trained, wide=False),
        "w2": make.normal(N, F, std=2 * F**-0.5, grad=trained, wide=False),
        "b1": make.normal(inner, grad=trained) if bias else None,
        "b2": make.normal(N, grad=trained) if bias else None,
        "norm_weight": make.normal(C * s * s, grad=trained) if norm != "none" else None,
        "norm_bias": make.normal(C * s * s, grad=trained) if case.get("norm_bias") else None,
        "wg": make.normal(F, K, std=K**-0.5, grad=trained, wide=False) if case.get("own_gate") else None,
        "scale": make.normal(1).abs().add(0.5).requires_grad_() if case.get("scale") else None,
        "row_mask": make.rows(rows, 4) > 0 if case.get("mask") else None,
        "act": case.get("act", "gelu"),
        "gated": gated,
        "norm": norm,
        "norm_act": case.get("norm_act", "none"),
        "eps": case.get("eps", 1e-5),
        "shuffle": s,
        "merge": m,
        "level": case.get("level", 0),
        "residual": case.get("residual", False),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x, rounded to what shuffle and merge need."""
    x, s, m = kw["x"].detach(), kw["shuffle"], kw["merge"]
    cut = x[:, :, : rows * s * m] if s > 1 else x[: rows * m]
    mask = kw.get("row_mask")
    kw = kw | {"row_mask": None if mask is None else mask[:rows].clone()}
    return kw | {"x": cut.contiguous().requires_grad_(kw["x"].requires_grad)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "b1 dropped": _scaled("b1", 0.0),
    "b2 halved": _scaled("b2", 0.5),
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "residual dropped": lambda kw: kw | {"residual": False} if kw["residual"] else None,
    "scale dropped": lambda kw: kw | {"scale": None} if kw["scale"] is not None else None,
    "row mask dropped": lambda kw: kw | {"row_mask": None} if kw["row_mask"] is not None else None,
    "another activation": lambda kw: kw | {"act": "relu" if kw["act"] != "relu" else "silu"},
    "no norm": lambda kw: (
        kw | {"norm": "none", "norm_weight": None, "norm_bias": None} if kw["norm"] != "none" else None
    ),
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    T, C, F, N = (case[d] for d in "TCFN")
    K, inner = C * case.get("shuffle", 1) ** 2 * case.get("merge", 1), _inner(case)
    first, second = 2 * T * K * inner, 2 * T * F * N
    backward = second + (0 if case.get("frozen") else first + second)
    backward += 0 if case.get("frozen_x") and case.get("norm", "none") == "none" else first
    return {"forward": first + second, "backward": backward + (first if case.get("level") else 0)}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    T, C, F, N = (case[d] for d in "TCFN")
    K, inner = C * case.get("shuffle", 1) ** 2 * case.get("merge", 1), _inner(case)
    weights = inner * K + N * F
    dx = 0 if case.get("frozen_x") else T * K
    return {
        "forward": itemsize * (T * K + weights + T * inner + T * N),
        "backward": itemsize * (T * N + T * K + T * inner + 2 * weights + dx),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, C, F, N = (case[d] for d in "TCFN")
    s, m, norm, e = case.get("shuffle", 1), case.get("merge", 1), case.get("norm", "none"), itemsize
    inner, channels, rows = _inner(case), C * s * s, T * m
    K, bias, trained = channels * m, case.get("bias", True), not case.get("frozen", False)
    affine = (norm != "none") + bool(case.get("norm_bias"))
    stats = 8 * rows * (norm != "none")
    normed = 0 if norm == "none" and s == 1 else e * (2 * T * K + affine * channels) + stats
    products = 2 if case.get("own_gate") else 1  # each reads x
    first = e * (products * T * K + inner * K + T * inner + bias * inner)
    residual = case.get("residual", False)
    dtype = torch.float32 if e == 4 else torch.bfloat16
    act = config(T, F, K, dtype, inner > F, arch(torch.empty(0)))

    forward = normed + first + e * (T * F + N * F + T * N + bias * N)
    closed = T * bool(case.get("mask")) + e * bool(case.get("scale"))
    if act.product is None or closed:
        forward += closed
        forward += e * (T * inner + T * F)
    else:
        forward += e * T * F * (0 if case.get("level") else 1)  # h beside pre, or alone
    forward += residual * e * T * N * (3 if bias else 1)  # a pass of its own beside b2

    backward = closed
    if case.get("scale"):
        dots = act.splits * -(-F // act.cols)
        backward += 4 * 2 * dots + 4 + (4 + e) * (e != 4)

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    if case.get("level"):
        backward += first
    if trained and bias:
        backward += e * T * N + 4 * N + cast(N)
        backward += 4 * inner * (2 * act.splits + 1) + cast(inner)
    backward += e * (T * N + N * F + T * F)  # dy W2
    backward += e * (T * inner + T * F + T * inner + trained * T * F)  # activation
    if trained:
        backward += e * (T * N + T * F + N * F) + e * (T * inner + products * T * K + inner * K)
    if trained or case.get("level"):
        backward += normed
    need_x = not case.get("frozen_x")
    if need_x or (trained and norm != "none"):
        backward += e * (T * inner + inner * K + (2 * products - 1) * T * K)  # dpre W1, the second one adds
        backward += residual * need_x * e * T * N  # dy once more, in the product or the norm's pass
        if norm != "none" or s > 1:
            tiles = _norm.config(rows, channels, arch(torch.empty(0)))
            backward += e * (T * K + need_x * T * K)
            if norm != "none":
                backward += e * (T * K + channels) + stats
                backward += e * channels * (case.get("norm_act", "none") != "none" and bool(case.get("norm_bias")))
                if channels > _norm.TOGETHER and need_x and trained:
                    backward += 2 * e * T * K + stats
            if trained and norm != "none":
                backward += 4 * channels * ((2 + affine) * tiles.programs + affine) + affine * cast(channels)
    return {"forward": forward, "backward": backward}
