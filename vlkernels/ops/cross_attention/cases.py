"""Shapes of cross_attention, for tests and benchmarks alike."""

from __future__ import annotations

import math

import torch

from ...testing.case import Case, Make
from .._attention import NORM_ROWS
from .._device import arch
from .reference import MASKED
from .triton import Dims, config


def _case(name, B, M, N, H, K, G=0, N2=0, tags=(), recipe="", **options) -> Case:
    """T = B M queries in all. Options: C, the channels of x in place of k and v; rows, those of the first source that
    an index chooses from; one_q, one_k, one_k2, sources of one row for the whole batch; the rest as the op's."""
    dims = {"T": B * M, "M": M, "N": N, "H": H, "K": K, "G": G or H}
    return Case(name, dims | ({"N2": N2} if N2 else {}), options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # what masks, orders and chooses, at once; few heads, for the interpreter runs it often
    _case("everything", 2, 32, 20, 1, 12, N2=33, mask=True, mask2=True, bias=True, rows=3, p=0.1, causal=True,
          tags=("all-precisions", "sharp")),
    # and what is computed before the attention
    _case("projected", 2, 20, 27, 4, 12, G=2, N2=21, C=24, kv_bias=True, norm="layer", bias=True,
          tags=("all-precisions", "sharp")),
    _case("perceiver", 3, 20, 45, 2, 24, N2=20, tags=("all-precisions",)),
    # the first layer of a resampler: queries and latents that no image has changed yet
    _case("first-layer", 3, 10, 35, 2, 16, N2=10, one_q=True, one_k2=True),
    _case("masked", 2, 18, 70, 2, 10, N2=9, mask=True, mask2=True, dead=True, p=0.2, tags=("all-precisions",)),
    _case("nothing-visible", 2, 7, 21, 2, 6, mask=True, dead=True, masked=-math.inf),
    _case("grouped", 2, 33, 40, 4, 8, G=2, N2=33, mask=True),
    _case("rms", 2, 9, 19, 4, 8, G=2, N2=9, norm="rms"),
    _case("level1", 2, 16, 37, 2, 8, N2=16, C=20, kv_bias=True),
    _case("split", 1, 12, 400, 1, 16, N2=12, p=0.1),
    _case("many-queries", 1, 75, 50, 2, 40, bias=True, one_k=True),
    _case("causal", 2, 21, 9, 2, 16, N2=24, causal=True, mask2=True),
    _case("wide-head", 1, 17, 35, 2, 96, N2=17),
    *(
        _case(name, B, M, N, H, K, tags=("bench", *(("uncounted",) if slow else ())), recipe=recipe, **options)
        for name, B, M, N, H, K, recipe, options, slow in (
            ("flamingo B64", 64, 64, 256, 8, 64, "OpenFlamingo's resampler", {"N2": 64}, False),
            ("flamingo B8", 8, 64, 256, 8, 64, "OpenFlamingo's resampler", {"N2": 64}, False),
            ("flamingo B1", 1, 64, 256, 8, 64, "OpenFlamingo's resampler", {"N2": 64}, True),
            ("flamingo B64 level1", 64, 64, 256, 8, 64, "OpenFlamingo's resampler", {"N2": 64, "C": 1024}, False),
            ("flamingo B16 8 frames", 16, 64, 2048, 8, 64, "OpenFlamingo on video", {"N2": 64}, True),
            ("idefics B64 qk-norm", 64, 64, 257, 16, 96, "IDEFICS' resampler", {"N2": 64, "norm": "layer"}, True),
            ("idefics2 B64", 64, 64, 729, 16, 96, "Idefics2's connector", {"N2": 64, "G": 4, "mask": True}, True),
            ("blip-2 B100", 100, 32, 257, 12, 64, "BLIP-2's Q-Former", {}, False),
            ("blip-2 B100 p0.1", 100, 32, 257, 12, 64, "BLIP-2's Q-Former, training", {"p": 0.1}, False),
            ("blip-2 itm B300", 300, 32, 257, 12, 64, "BLIP-2's stage 1, ITM", {"rows": 100}, True),
            ("instructblip self B16", 16, 160, 160, 12, 64, "InstructBLIP, queries and text", {"mask": True}, True),
            ("qwen-vl B16", 16, 256, 1024, 32, 128, "Qwen-VL's resampler", {"one_q": True}, True),
            ("mplug-owl B64", 64, 64, 257, 16, 64, "mPLUG-Owl's abstractor", {"N2": 64}, True),
        )
    ),
)  # fmt: skip


def _batch(case: Case) -> tuple[int, int]:
    """B, and M: of fewer queries than one image has, one image with these."""
    M = min(case["M"], max(case["T"], 1))
    return -(-case["T"] // M), M


def _rows(case: Case) -> int:
    """Rows of the first source."""
    return case.get("rows") or (1 if case.get("one_k") else _batch(case)[0])


def inputs(case: Case, make: Make) -> dict:
    """Arguments of cross_attention; every additive term is at least 30 % of the scores' or the output's scale."""
    (B, M), N, H, K, G = _batch(case), case["N"], case["H"], case["K"], case["G"]
    N2, C, rows, norm = case.dims.get("N2", 0), case.get("C"), _rows(case), case.get("norm", "none")
    kw: dict = {"q": make.normal(1 if case.get("one_q") else B, M, H, K, grad=True)}
    if C:
        kw["x"] = make.normal(rows, N, C, grad=True)
        kw["kv_weight"] = make.normal(2 * G * K, C, std=C**-0.5, grad=True, wide=False)
        kw["kv_bias"] = make.normal(2 * G * K, grad=True) if case.get("kv_bias") else None
    else:
        kw["k"], kw["v"] = (make.normal(rows, N, G, K, grad=True) for _ in "kv")
    if N2:
        kw["k2"], kw["v2"] = (make.normal(1 if case.get("one_k2") else B, N2, G, K, grad=True) for _ in "kv")
    for name, count, keys in (("mask", rows, N), ("mask2", B, N2)):
        if case.get(name):
            kw[name] = make.rows(count * keys, 4).view(count, keys) > 0
            if case.get("dead"):
                kw[name][0] = False
    if case.get("bias"):
        kw["bias"] = make.normal(1, H, M, N)
    if case.get("rows"):
        kw["index"] = make.rows(B, rows)
    if norm != "none":
        for side in "qk":
            kw[side + "_norm_weight"] = make.normal(K, grad=True)
            kw[side + "_norm_bias"] = make.normal(K, grad=True) if norm == "layer" else None
    kw["seed"] = make.seed() if case.get("p") else None
    return kw | {
        "norm": norm,
        "p": case.get("p", 0.0),
        "causal": case.get("causal", False),
        "masked": case.get("masked", MASKED),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments with the first `rows` queries of each image."""
    q = kw["q"].detach()[:, :rows].contiguous().requires_grad_(kw["q"].requires_grad)
    if kw.get("bias") is None:
        return kw | {"q": q}
    bias = kw["bias"][:, :, :rows]
    # strides of a tensor of its own, also along axes of length 1
    return kw | {"q": q, "bias": bias.flatten().view(bias.shape)}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw.get(name) is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "second source halved": _scaled("v2", 0.5),
    "keys' bias dropped": _scaled("kv_bias", 0.0),
    "bias dropped": _scaled("bias", 0.0),
    "q_norm_bias dropped": _scaled("q_norm_bias", 0.0),
    "k_norm_weight halved": _scaled("k_norm_weight", 0.5),
    "mask dropped": lambda kw: kw | {"mask": None} if kw.get("mask") is not None else None,
    "mask2 dropped": lambda kw: kw | {"mask2": None} if kw.get("mask2") is not None else None,
    "order dropped": lambda kw: kw | {"causal": False} if kw["causal"] else None,
    "another dropout": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["p"] else None,
    "another index": lambda kw: kw | {"index": kw["index"].flip(0)} if kw.get("index") is not None else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products; the backward computes the scores once more."""
    (B, M), N, H, K = _batch(case), case["N"] + case.dims.get("N2", 0), case["H"], case["K"]
    product = 2 * B * H * M * N * K
    projection = 4 * _rows(case) * case["N"] * case["G"] * K * case.get("C", 0)
    tiles = _tiles(case, 2)
    return {
        "forward": 2 * product + projection,
        "backward": (5 if tiles.one else 7) * product + 3 * projection,
    }


def padding(case: Case) -> float:
    """What the products of the attention compute over what is asked for: tiles of queries, keys and head dims."""
    tiles = _tiles(case, 2)

    def filled(count: int, block: int) -> int:
        return -(-count // block) * block

    keys = filled(case["N"], tiles.n) + filled(case.dims.get("N2", 0), tiles.n)
    rows = (
        filled(case["M"], tiles.m)
        / case["M"]
        * filled(case["K"], max(16, 2 ** (case["K"] - 1).bit_length()))
        / case["K"]
    )
    return rows * keys / (case["N"] + case.dims.get("N2", 0))


def _tiles(case: Case, itemsize: int):
    (B, M), dtype = _batch(case), torch.float32 if itemsize == 4 else torch.bfloat16
    dims = Dims(B * M, M, case["N"], case.dims.get("N2", 0), case["H"], case["G"], case["K"], bool(case.get("rows")))
    return config(dims, dtype, arch(torch.empty(0)))


def _sizes(case: Case, e: int) -> dict[str, int]:
    """Bytes of the arguments and of y."""
    (B, M), N, H, K, G = _batch(case), case["N"], case["H"], case["K"], case["G"]
    N2, rows = case.dims.get("N2", 0), _rows(case)
    masks = rows * N * bool(case.get("mask")) + B * N2 * bool(case.get("mask2"))
    return {
        "q": e * (1 if case.get("one_q") else B) * M * H * K,
        "kv": 2 * e * rows * N * G * K,
        "kv2": 2 * e * (1 if case.get("one_k2") else B) * N2 * G * K,
        "others": masks + e * H * M * N * bool(case.get("bias")) + 8 * B * bool(case.get("rows")),
        "y": e * B * M * H * K,
        "stats": 8 * B * H * M,
        "x": e * rows * N * case.get("C", 0),
        "w": 2 * e * G * K * case.get("C", 0),
    }


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    s = _sizes(case, itemsize)
    source = s["x"] + s["w"] if case.get("C") else s["kv"]
    return {
        "forward": s["q"] + source + s["kv2"] + s["others"] + s["y"] + s["stats"],
        "backward": 2 * (s["q"] + source + s["kv2"]) + s["others"] + 2 * s["y"] + s["stats"],
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    e, s, tiles = itemsize, _sizes(case, itemsize), _tiles(case, itemsize)
    (B, M), H, K, G = _batch(case), case["H"], case["K"], case["G"]
    N, N2, rows, norm = case["N"], case.dims.get("N2", 0), _rows(case), case.get("norm", "none")
    projected, indexed = bool(case.get("C")), bool(case.get("rows"))
    # only rows that the index names are read
    read = s["kv"] * min(1.0, B / rows) if indexed else s["kv"]
    sources = read + s["kv2"]
    product = s["x"] + s["w"] + s["kv"] + 2 * e * G * K * bool(case.get("kv_bias")) if projected else 0
    normed = norm_grads = 0
    if norm != "none":
        affine = 2 if norm == "layer" else 1
        for heads in (s["q"] // e // K, s["kv"] // e // K // 2, s["kv2"] // e // K // 2):
            blocks = -(-heads // NORM_ROWS)
            normed += heads * (2 * e * K + 8) + affine * e * K * (heads > 0)
            norm_grads += heads * (3 * e * K + 8) + (heads > 0) * (e * K + 16 * K * min(blocks, 264) + 8 * K)
        norm_grads += 2 * 12 * K + 4 * (4 + e) * K * (e != 4)
    forward = product + normed + s["q"] + sources + s["others"] + s["y"] + s["stats"]
    if tiles.splits > 1:
        part = tiles.splits * (4 * B * M * H * K + s["stats"])
        forward += 2 * part

    state = s["q"] + 2 * s["y"] + s["stats"]
    first = B if case.get("one_k") else rows  # rows of dk as the kernels write them
    second = B
    wide1, wide2 = (4 if case.get("one_k") and B > 1 else e), (4 if case.get("one_k2") and B > 1 else e)
    dkv = 2 * wide1 * first * N * G * K + 2 * wide2 * second * N2 * G * K
    whole = (not tiles.one or tiles.back_splits == 1) and not (case.get("one_q") and B > 1)
    dq = (tiles.back_splits if tiles.one else 1) * B * M * H * K * (e if whole else 4)
    backward = product + normed + dkv + dq
    if tiles.one:
        backward += state + sources + s["others"]
    else:
        backward += state + sources + s["others"]
        backward += state + sources + s["others"] + (state if N2 else 0)
        backward += 8 * 6 * B if indexed else 0
    if not whole:
        backward += dq + 4 * s["q"] // e + (4 + e) * s["q"] // e * (e != 4)
    for once, wide, n in ((case.get("one_k") and B > 1, wide1, N), (case.get("one_k2") and B > 1, wide2, N2)):
        if once:
            backward += 2 * (wide * B + 4) * n * G * K + (2 * (4 + e) * n * G * K if e != 4 else 0)
    backward += norm_grads
    if projected:
        backward += 2 * s["kv"] + 2 * s["x"] + 2 * s["w"] + s["kv"] * bool(case.get("kv_bias"))
    return {"forward": round(forward), "backward": round(backward)}
