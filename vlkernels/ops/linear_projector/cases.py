"""Shapes of linear_projector, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .. import _norm
from .._device import arch


def _case(name, T, C, N, tags=(), recipe="", **options) -> Case:
    """T rows of y; C channels of x before the shuffle.

    images: x is (images, T / images, C). positions: rows P of the table; gathered: by position_index. packed: into a
    sequence of _length(T) rows.
    """
    return Case(name, {"T": T, "C": C, "N": N}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # every term at once
    _case("everything", 36, 12, 40, norm="layer", shuffle=2, norm_bias=True, bias=True, positions=23, gathered=True,
          packed=True, tags=("all-precisions", "sharp")),
    _case("gemma", 33, 40, 24, norm="rms", norm_offset=1.0, eps=1e-6, tags=("all-precisions",)),
    _case("shuffle", 36, 10, 17, shuffle=3),
    _case("frozen", 20, 24, 40, norm="layer", frozen=True),
    _case("positions", 39, 14, 150, bias=True, images=3, positions=17, tags=("all-precisions",)),
    _case("gathered", 39, 14, 24, bias=True, positions=50, gathered=True),
    _case("packed", 33, 14, 24, bias=True, packed=True, tags=("all-precisions",)),
    _case("packed, all", 12, 6, 10, norm="rms", images=2, positions=6, packed=True, bias=True),
    # a frozen projector before trained text embeddings, as when soft prompts or new words are learned
    _case("packed, frozen", 20, 24, 40, shuffle=2, frozen=True, frozen_x=True, packed=True),
    _case("gemma-3-4b B16", 4096, 1152, 2560, norm="rms", norm_offset=1.0, eps=1e-6, tags=("bench",),
          recipe="Gemma 3 4B, 16 images of 256 tokens"),
    _case("ln-shuffle B16", 4096, 1152, 4096, norm="layer", norm_bias=True, shuffle=2, tags=("bench",),
          recipe="16 images of 32 x 32 patches"),
    _case("gemma-3-4b B16 packed", 4096, 1152, 2560, norm="rms", norm_offset=1.0, eps=1e-6, packed=True,
          tags=("bench",), recipe="Gemma 3 4B, 16 images of 256 tokens and 64 words each"),
    _case("llava-7b B16 packed", 9216, 1024, 4096, bias=True, frozen_x=True, packed=True, tags=("bench",),
          recipe="LLaVA-7B, 16 images of 576 tokens and 144 words each"),
    _case("vl-adapter B300", 10800, 2048, 768, bias=True, frozen_x=True, positions=32200, gathered=True,
          tags=("bench",), recipe="VL-T5 with 36 boxes, 300 images: the word table read as order embedding"),
    _case("idefics3 B16", 2704, 1152, 4096, shuffle=2, tags=("bench",), recipe="Idefics3-8B, 16 tiles of 26 x 26"),
    _case("positions B16", 9216, 1024, 4096, bias=True, images=16, positions=576, packed=True, tags=("bench",),
          recipe="LLaVA-7B with a learned position a patch"),
)  # fmt: skip


def _length(T: int) -> int:
    """Rows of the text sequence: a word for every four image tokens."""
    return T + T // 4


def inputs(case: Case, make: Make) -> dict:
    """Arguments of linear_projector; every additive term is at least 30 % of the output's scale."""
    T, C, N = (case[d] for d in "TCN")
    s, norm, trained = case.get("shuffle", 1), case.get("norm", "none"), not case.get("frozen", False)
    K, images, P = C * s * s, case.get("images"), case.get("positions")
    shape = (1, 2 * s, T // 2 * s, C) if s > 1 else (T, C) if images is None else (images, T // images, C)
    packed, gathered = case.get("packed", False), case.get("gathered", False)
    return {
        "x": make.normal(*shape, grad=not case.get("frozen_x")),
        "weight": make.normal(N, K, std=K**-0.5, grad=trained, wide=False),
        "bias": make.normal(N, grad=trained) if case.get("bias") else None,
        "norm_weight": make.normal(K, grad=trained) if norm != "none" else None,
        "norm_bias": make.normal(K, grad=trained) if case.get("norm_bias") else None,
        "position": make.normal(P, N, grad=trained) if P else None,
        "position_index": make.rows(T, P) if gathered else None,
        "into": make.normal(_length(T), N, grad=True) if packed else None,
        "index": make.rows(T, _length(T)) if packed else None,
        "norm": norm,
        "eps": case.get("eps", 1e-5),
        "norm_offset": case.get("norm_offset", 0.0),
        "shuffle": s,
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x, of each image, rounded to what the shuffle needs."""
    x, s = kw["x"].detach(), kw["shuffle"]
    cut = x[:, :, : rows // 2 * s] if s > 1 else x[..., :rows, :]
    kept = cut.numel() // (x.shape[-1] * s * s)
    kw = kw | {"x": cut.contiguous().requires_grad_(kw["x"].requires_grad)}
    for name in ("index", "position_index"):
        if kw[name] is not None:
            kw[name] = kw[name][:kept].clone()
    if kw["into"] is not None and not kept:
        kw["into"] = kw["into"].detach()[:0].requires_grad_(kw["into"].requires_grad)
    return kw


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "bias dropped": _scaled("bias", 0.0),
    "norm_bias halved": _scaled("norm_bias", 0.5),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "an offset": lambda kw: kw | {"norm_offset": kw["norm_offset"] + 1.0},
    "no norm": lambda kw: kw | {"norm": "none", "norm_weight": None, "norm_bias": None},
    "position halved": _scaled("position", 0.5),
    "another position": lambda kw: kw | {"position_index": kw["position_index"].flip(0)},
    "text dropped": _scaled("into", 0.0),
    "another row": lambda kw: kw | {"index": kw["index"].flip(0)},
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products."""
    product = 2 * case["T"] * case["C"] * case.get("shuffle", 1) ** 2 * case["N"]
    need_x = not case.get("frozen_x") or (case.get("norm", "none") != "none" and not case.get("frozen"))
    return {"forward": product, "backward": product * (need_x + (not case.get("frozen")))}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once; of a gathered table the rows it gives."""
    T, N, K = case["T"], case["N"], case["C"] * case.get("shuffle", 1) ** 2
    rows = _length(T) - T if case.get("packed") else 0  # of the sequence beside y's
    P, trained = case.get("positions") or 0, not case.get("frozen")
    table = min(P, T if case.get("gathered") else T // (case.get("images") or 1))
    dx = T * K * (not case.get("frozen_x"))
    return {
        "forward": itemsize * (T * K + N * K + T * N + (2 * rows + table) * N),
        "backward": itemsize * (T * N + T * K + dx + N * K * (1 + trained) + (2 * rows + P * trained) * N),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, N, e = case["T"], case["N"], itemsize
    s, norm, trained = case.get("shuffle", 1), case.get("norm", "none"), not case.get("frozen", False)
    K, bias, need_x = case["C"] * s * s, bool(case.get("bias")), not case.get("frozen_x")
    P, gathered, packed = case.get("positions") or 0, case.get("gathered"), case.get("packed")
    affine, stats = (norm != "none") + bool(case.get("norm_bias")), 8 * T * (norm != "none")
    # without a norm the shuffle is done once, before the operator
    normed = 0 if norm == "none" else e * (2 * T * K + affine * K) + stats
    product = e * (T * K + N * K + T * N)
    per_image, L = T // (case.get("images") or 1), _length(T)
    # the plan of the write, (L,): filled, then T rows copied into it as ATen counts an index_copy_, then read
    inverse = 8 * L + 8 * T + 8 * (2 * L + 2 * T) + 8 * L

    def cast(size: int) -> int:
        return (4 + e) * size if e != 4 else 0

    forward = normed + product + e * bias * N + 2 * e * T * K * (norm == "none" and s > 1)
    if P:
        forward += e * N * min(P, T if gathered else per_image) + 8 * T * bool(gathered)
    if packed:
        forward += e * T * N + e * (L - T) * N + e * L * N + inverse
    elif P:
        forward += 2 * e * T * N

    backward = 0
    if packed:
        backward += inverse + e * (2 * L - T) * N
        if trained or need_x:
            backward += 2 * e * T * N + 8 * T
    if trained and P:
        if gathered:
            backward += e * T * N + 8 * T + e * P * N
        else:
            backward += e * T * N + 4 * per_image * N + cast(per_image * N)
            backward += 0 if per_image == P else e * (P + per_image) * N
    if trained:
        backward += product + normed
        if bias:
            backward += e * T * N + 4 * N + cast(N)
    if need_x or (trained and norm != "none"):
        backward += product
    if need_x and (norm != "none" or s > 1):
        backward += 2 * e * T * K
    if norm != "none":
        backward += e * (T * K + K) + stats
        if K > _norm.TOGETHER and trained:
            backward += 2 * e * T * K + stats
        if trained:
            programs = _norm.config(T, K, arch(torch.empty(0))).programs
            backward += 4 * K * ((2 + affine) * programs + affine) + affine * cast(K)
    return {"forward": forward, "backward": backward}
