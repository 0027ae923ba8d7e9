"""Shapes of dora_linear, for tests and benchmarks alike."""

from __future__ import annotations

import torch
import triton

from ...testing.case import Case, Make
from .._device import arch
from .reference import row_norm
from .triton import Config, Dims, config


def _case(name, T, K, N, R, tags=(), recipe="", **options) -> Case:
    return Case(name, {"T": T, "K": K, "N": N, "R": R}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "amp-bf16", "bf16+fp32 amp")

CASES = (
    _case("odd", 70, 75, 141, 5, p=0.1, bias=True, tags=("all-precisions",)),
    # more than one tile along every axis, partial sums over rows and over column blocks
    _case("tiles", 150, 136, 264, 16, p=0.05, bias=True, tags=("all-precisions", "sharp")),
    # without dropout: one product with W each way; two rank tiles, past the rank where dy is read once for ds and dB
    _case("wide-rank", 75, 72, 80, 130, bias=True, tags=("all-precisions",)),
    _case("plain", 70, 75, 141, 5, tags=("all-precisions",)),
    _case("long-row", 20, 900, 264, 40, p=0.1),
    # row ranges with partial sums for the columns and for dB
    _case("many-rows", 530, 24, 20, 33, p=0.1),
    _case("rank1", 9, 40, 24, 1, norm=True),
    _case("one-row", 1, 64, 48, 8, bias=True),
    _case("norm-given", 37, 40, 56, 6, p=0.25, norm=True, bias=True),
    _case("train-weight", 33, 40, 56, 4, bias=True, train_weight=True),
    _case("train-weight-dropout", 33, 40, 56, 4, p=0.1, train_weight=True),
    _case("level1", 70, 75, 141, 5, level=1, bias=True),
    _case("level1-dropout", 70, 75, 141, 5, p=0.1, level=1, train_weight=True),
    _case("rank-384", 40, 72, 64, 384, p=0.1, tags=("slow",)),
    *(
        _case(f"{K}x{N} r{R} p{p} M{T}" + f" level {level}" * level, T, K, N, R, p=p, level=level,
              tags=("bench",) if (K, N, R) == (4096, 4096, 128) and not level else ("bench", "uncounted"),
              recipe=recipe)
        for T, K, N, R, p, level, recipe in (
            (8192, 4096, 4096, 128, 0.05, 0, "LLaVA-1.5-7B q/k/v/o"),
            (8192, 4096, 4096, 128, 0.0, 0, "LLaVA-1.5-7B q/k/v/o, dropout 0"),
            (8192, 4096, 4096, 128, 0.05, 1, "LLaVA-1.5-7B q/k/v/o"),
            (8192, 4096, 4096, 128, 0.0, 1, "LLaVA-1.5-7B q/k/v/o, dropout 0"),
            (8192, 4096, 11008, 32, 0.0, 0, "LLaMA-7B gate/up, DoRA paper's r = 32"),
            (8192, 5120, 5120, 384, 0.0, 0, "vision-LLM at r = 384, arXiv 2603.22276"),
        )
    ),
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of dora_linear; every additive term is at least 30 % of the output's scale, g is of order 1."""
    T, K, N, R = (case[d] for d in "TKNR")
    p = case.get("p", 0.0)
    kw = {
        "x": make.normal(T, K, grad=True),
        "weight": make.normal(N, K, std=K**-0.5, grad=case.get("train_weight", False), wide=False),
        "a": make.normal(R, K, std=K**-0.5, role="adapter", grad=True, wide=False),
        "b": make.normal(N, R, std=R**-0.5, role="adapter", grad=True, wide=False),
        "magnitude": make.normal(N, std=1.5, role="adapter", grad=True),
        "norm": None,
        "bias": make.normal(N, grad=True) if case.get("bias") else None,
        "seed": make.seed() if p else None,
        "scale": 1.0,
        "p": p,
        "level": case.get("level", 0),
    }
    if case.get("norm"):
        kw["norm"] = row_norm(kw["weight"], kw["a"], kw["b"], kw["scale"])
    return kw


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x."""
    return kw | {"x": kw["x"].detach()[:rows].requires_grad_()}


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "branch dropped": lambda kw: kw | {"scale": 0.0},
    "branch halved": lambda kw: kw | {"scale": kw["scale"] / 2},
    "gain halved": lambda kw: kw | {"magnitude": kw["magnitude"].detach().div(2).requires_grad_()},
    "gain dropped": lambda kw: kw | {"magnitude": _norm(kw, kw["scale"]).to(kw["magnitude"]).requires_grad_()},
    "norm of the weight alone": lambda kw: kw | {"norm": _norm(kw, 0.0)},
    "bias dropped": lambda kw: kw | {"bias": kw["bias"] * 0} if kw["bias"] is not None else None,
    "another mask": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["seed"] is not None else None,
    "no mask": lambda kw: kw | {"p": 0.0} if kw["p"] else None,
}


def _norm(kw: dict, scale: float) -> torch.Tensor:
    return row_norm(kw["weight"], kw["a"], kw["b"], scale)


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two; x, a, b and the magnitude needing gradients."""
    T, K, N, R = (case[d] for d in "TKNR")
    plain = 2 * T * K * N * (2 if case.get("p") else 1)
    branch = 2 * T * R * (K + N)
    norm = 0 if case.get("norm") else 2 * N * K * R
    weight = plain if case.get("train_weight") else 0
    again = 2 * T * K * N if case.get("level") else 0
    return {"forward": plain + branch + norm, "backward": plain + weight + 2 * branch + again}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument read once and each result written once."""
    T, K, N, R = (case[d] for d in "TKNR")
    weights = N * K + R * (K + N) + N
    return {
        "forward": itemsize * (T * K + weights + T * N),
        "backward": itemsize * (T * N + T * K + weights + T * K + R * (K + N) + N),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves, tile re-reads served by the cache left out; one dtype throughout.

    A test holds this to the count of masked loads, stores and ATen operands.
    """
    T, K, N, R = (case[d] for d in "TKNR")
    tiles, e = _config(case, itemsize), itemsize
    drop, bias, level, train = (case.get(name, 0) for name in ("p", "bias", "level", "train_weight"))
    product = e * (T * K + N * K + T * N)  # either way, with W or for dW
    gain = e * N + 4 * N
    mask = 8 if drop else 0

    forward = 0
    if not case.get("norm"):
        blocks = triton.cdiv(K, tiles.norm.cols)
        forward += e * (N * K + R * K + N * R) + 8 * blocks * N + 4 * N
    forward += e * (T * K + R * K) + mask + _partial(tiles.down.splits, T * R, e)
    forward += product + (product + e * T * K if drop else 0)  # with dropout keep * x is written
    forward += e * (T * R + N * R + (3 if drop else 2) * T * N) + gain + e * N * bool(bias)  # update

    backward = 0
    if drop and (train or level):
        backward += 2 * e * T * K + mask
    if level:
        backward += product
    backward += e * 3 * T * N + gain  # columns: dy, u, g dy
    sums = 2 if bias else 1
    backward += 2 * 4 * N * tiles.columns.splits * sums  # written, read by finish
    backward += e * N * R + gain + 4 * N * R  # g B
    backward += (4 + e) * N * R + e * N * R + gain + e * N * sums  # finish
    if tiles.up is not None:
        backward += e * T * N + 4 * N * R + e * T * R
        backward += _partial(triton.cdiv(N, tiles.up.cols), T * R, e) + _partial(tiles.up.splits, N * R, 4)
    else:
        backward += e * T * N + 4 * N * R + _partial(tiles.down_dy.splits, T * R, e)
        backward += e * (T * N + T * R) + _partial(tiles.outer_dy.splits, N * R, 4)
    backward += e * (T * K + T * R) + mask + _partial(tiles.outer_x.splits, K * R, e)
    if train:
        backward += product + (product + e * N * K if drop else 0)
    backward += product + (product if drop else 0)
    backward += e * (T * R + K * R + (3 if drop else 2) * T * K) + mask  # update of dx
    return {"forward": forward, "backward": backward}


def _partial(splits: int, size: int, itemsize: int) -> int:
    """Writing a result, through fp32 partial sums when it has several."""
    return itemsize * size + (8 * splits * size if splits > 1 else 0)


def _config(case: Case, itemsize: int) -> Config:
    dims = Dims(*(case[d] for d in "TKNR"))
    return config(dims, torch.float32 if itemsize == 4 else torch.bfloat16, arch(torch.empty(0)))
