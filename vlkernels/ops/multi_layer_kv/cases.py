"""Shapes of multi_layer_kv, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._device import arch
from .triton import config


def _case(name, T, C, L, W, tags=(), recipe="", **options) -> Case:
    """T tokens of C channels, L layers of W columns. bias: of the linears; norm_weight, norm_bias: default with a norm,
    a layer norm; frozen: all but x; only_norm: the linears alone are frozen."""
    return Case(name, {"T": T, "C": C, "L": L, "W": W}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # every term at once
    _case("everything", 33, 36, 3, 20, norm="layer", bias=True, tags=("all-precisions", "sharp")),
    _case("flamingo", 21, 40, 6, 24, norm="layer", frozen_x=True, tags=("all-precisions",)),
    _case("rms", 17, 24, 3, 14, norm="rms", eps=1e-6, tags=("all-precisions",)),
    _case("no norm", 37, 20, 4, 18, bias=True),
    _case("no affine", 11, 24, 2, 12, norm="layer", norm_weight=False, norm_bias=False, bias=True),
    _case("shift alone", 11, 24, 2, 12, norm="layer", norm_weight=False, bias=True),
    _case("scale alone", 11, 24, 2, 12, norm="layer", norm_bias=False, bias=True),
    _case("frozen", 11, 24, 2, 12, norm="layer", bias=True, frozen=True),
    _case("norms alone", 11, 24, 2, 12, norm="layer", bias=True, only_norm=True, frozen_x=True),
    _case("one layer", 37, 17, 1, 9, norm="rms"),
    _case("many rows of weights", 17, 20, 2, 150, norm="layer", images=17),
    _case("wide", 3, 4200, 2, 6, norm="layer"),
    _case("open-flamingo B64", 16384, 1024, 6, 1024, norm="layer", frozen_x=True, tags=("bench",),
          recipe="OpenFlamingo's resampler, 64 images of 256 tokens, six layers of 8 heads of 64"),
    _case("blip-2 B100", 25700, 1408, 6, 1536, bias=True, frozen_x=True, tags=("bench",),
          recipe="BLIP-2's Q-Former, 100 images of 257 tokens, every other of 12 layers"),
    _case("idefics2 B64", 46656, 4096, 3, 768, norm="rms", eps=1e-6, tags=("bench",),
          recipe="Idefics2's resampler, 64 images of 729 tokens, three layers of 4 groups of 96"),
    _case("mllama B4", 25616, 4096, 8, 2048, tags=("bench",),
          recipe="Llama 3.2 11B Vision, 4 images of 4 tiles of 1601 tokens, eight layers of 8 groups of 128"),
)  # fmt: skip


def _terms(case: Case) -> tuple[bool, bool, bool]:
    """Which of norm_weight, norm_bias and bias there are."""
    norm = case.get("norm", "none")
    norm_weight = norm != "none" and case.get("norm_weight", True)
    return norm_weight, norm == "layer" and case.get("norm_bias", True), bool(case.get("bias"))


def _trained(case: Case) -> tuple[bool, bool, bool]:
    """What gets a gradient: x, the linears, the norms."""
    frozen = case.get("frozen", False)
    return not case.get("frozen_x", False), not frozen and not case.get("only_norm", False), not frozen


def inputs(case: Case, make: Make) -> dict:
    """Arguments of multi_layer_kv; every additive term is at least 30 % of the output's scale."""
    T, C, L, W = (case[d] for d in "TCLW")
    norm_weight, norm_bias, bias = _terms(case)
    need_x, linears, norms = _trained(case)
    images = case.get("images")
    shape = (T, C) if images is None else (images, T // images, C)
    return {
        "x": make.normal(*shape, grad=need_x),
        "weight": make.normal(L * W, C, std=C**-0.5, grad=linears, wide=False),
        "bias": make.normal(L * W, grad=linears) if bias else None,
        "norm_weight": make.normal(L, C, grad=norms) if norm_weight else None,
        "norm_bias": make.normal(L, C, grad=norms) if norm_bias else None,
        "layers": L,
        "norm": case.get("norm", "none"),
        "eps": case.get("eps", 1e-5),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x, of each image."""
    x = kw["x"].detach()[..., :rows, :].contiguous()
    return kw | {"x": x.requires_grad_(kw["x"].requires_grad)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "bias dropped": _scaled("bias", 0.0),
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "norms of other layers": lambda kw: kw | {n: kw[n].detach().roll(1, 0) for n in ("norm_weight", "norm_bias")},
    "no norm": lambda kw: kw | {"norm": "none", "norm_weight": None, "norm_bias": None},
    "another norm": lambda kw: kw | {"norm": "rms", "norm_bias": None},
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    product = 2 * case["T"] * case["C"] * case["L"] * case["W"]
    need_x, linears, norms = _trained(case)
    outer = linears or (norms and _terms(case)[0])
    return {"forward": product, "backward": product * (need_x + outer)}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    T, C, N = case["T"], case["C"], case["L"] * case["W"]
    need_x, linears, norms = _trained(case)
    return {
        "forward": itemsize * (T * C + N * C + T * N),
        "backward": itemsize * (T * N + T * C + N * C + need_x * T * C + linears * N * C),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, C, L, W = (case[d] for d in "TCLW")
    N, e, norm = L * W, itemsize, case.get("norm", "none") != "none"
    norm_weight, norm_bias, bias = _terms(case)
    need_x, linears, norms = _trained(case)
    affine, stats = norm_weight + norm_bias, 8 * T * norm
    normed = 2 * e * T * C + stats if norm else 0
    product = e * (T * C + N * C + T * N)

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    forward = normed + product + e * N * (bias or norm_bias)
    if affine:
        forward += e * (N * C + norm_weight * N * C + affine * L * C) + norm_bias * e * N * (1 + bias)

    backward = 0
    d = (bias and linears) or (norm_bias and (linears or norms))
    if d:
        backward += e * T * N + 4 * N
    if bias and linears:
        backward += cast(N)
    outer = linears or (norms and norm_weight)
    if outer:
        backward += normed + product
    if affine and (linears or norms):
        backward += e * N * C * (outer + linears + norms) + 4 * N * (d and norm_bias) + affine * e * L * C
        if norms:
            splits = config(L, W, C, arch(torch.empty(0))).splits
            backward += affine * (4 * L * C * (2 * splits + 1) + cast(L * C))
    if need_x:
        backward += product + (e * (2 * N * C + L * C) if norm_weight else 0)
        if norm:
            backward += 3 * e * T * C + stats
    return {"forward": forward, "backward": backward}
