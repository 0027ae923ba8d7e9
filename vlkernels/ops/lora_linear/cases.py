"""Shapes of lora_linear, for tests and benchmarks alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton

from ...testing.case import Case, Make
from .. import _lora_bytes, _lora_plan, _nf4, _nf4_triton
from .._device import arch
from .._lora import Config, Dims, config
from .plans import packed_copies


def _case(name, T, K, N, R, tags=(), recipe="", **options) -> Case:
    return Case(name, {"T": T, "K": K, "N": N, "R": R}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "amp-bf16", "bf16+fp32 amp")

CASES = (
    _case("odd", 70, 75, 141, 5, p=0.1, bias=True, tags=("all-precisions",)),
    # more than one tile along every axis, partial sums over rows and over column blocks
    _case("tiles", 150, 136, 264, 16, p=0.05, bias=True, lora_bias=True, tags=("all-precisions", "sharp")),
    # past the rank where dy is read once for ds and dB; two rank tiles
    _case("wide-rank", 75, 72, 80, 130, bias=True, tags=("all-precisions",)),
    _case("long-row", 20, 900, 520, 40, p=0.1),
    # row ranges with partial sums for dB and dA apart
    _case("many-rows", 530, 24, 20, 33, p=0.1),
    _case("rank1", 9, 40, 24, 1, p=0.5),
    _case("one-row", 1, 64, 48, 8),
    _case("base", 37, 40, 56, 6, p=0.25, base=True),
    _case("train-weight", 33, 40, 56, 4, bias=True, train_weight=True),
    # 4-bit weights: blocks across rows and bytes across rows, which only the dense path takes
    _case("nf4-odd", 70, 75, 141, 5, p=0.1, bias=True, quant="nf4", tags=("all-precisions",)),
    # dequantised in the product: blocks across rows; then whole blocks, in two ranges of K
    _case("nf4-few-rows", 37, 136, 72, 6, bias=True, quant="nf4", tags=("all-precisions",)),
    _case("nf4-long-row", 9, 1152, 40, 4, p=0.1, bias=True, quant="nf4"),
    _case("fp4-plain-absmax", 20, 128, 48, 3, quant="fp4", blocksize=128, double=False),
    # dense in forward, and kept for backward
    _case("nf4-many-rows", 530, 40, 24, 8, quant="nf4", blocksize=32),
    _case("rank-512", 40, 32, 24, 512, p=0.1, tags=("slow",)),
    *(
        _case(f"{K}x{N} r{R} p{p} M{T}", T, K, N, R, p=p, tags=("bench",), recipe=recipe)
        for T, K, N, R, p, recipe in (
            (8192, 4096, 4096, 128, 0.05, "LLaVA-1.5-7B LoRA q/k/v/o"),
            (8192, 4096, 4096, 128, 0.0, "LLaVA-1.5-7B LoRA q/k/v/o, dropout 0"),
            (2048, 4096, 4096, 128, 0.05, "LLaVA-1.5-7B LoRA q/k/v/o, short batch"),
            (8192, 4096, 11008, 128, 0.05, "LLaVA-1.5-7B LoRA gate/up"),
            (8192, 11008, 4096, 128, 0.05, "LLaVA-1.5-7B LoRA down"),
            (8192, 4096, 4096, 16, 0.05, "r = 16, peft examples"),
            (8192, 4096, 14336, 64, 0.0, "Llama-3-8B gate/up"),
            (8192, 4096, 4096, 256, 0.05, "r = 256"),
        )
    ),
    *(
        _case(f"nf4 4096x4096 r64 M{T}", T, 4096, 4096, 64, quant="nf4", tags=("bench", "uncounted"), recipe=recipe)
        for T, recipe in ((8192, "QLoRA of a 7B model, r = 64"), (16, "the same, 16 rows"))
    ),
)


# every width, rank and row count that people train with, and decoding's: `python -m benchmarks.ops --sweep`
SWEEP = tuple(
    _case(f"{K}x{N} r{R} p{p} M{T}", T, K, N, R, p=p, tags=("bench",))
    for T, ranks, dropouts in (*((T, (8, 16, 64, 128, 256), (0.0, 0.05)) for T in (2048, 8192, 32768)),
                               (1, (16, 128), (0.0,)), (16, (16, 128), (0.0,)))
    for K, N in ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336))
    for R in ranks
    for p in dropouts
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of lora_linear; every additive term is at least 30 % of the output's scale."""
    T, K, N, R = (case[d] for d in "TKNR")
    p = case.get("p", 0.0)
    base = case.get("base", False)
    weight = None if base else make.normal(N, K, std=K**-0.5, grad=case.get("train_weight", False), wide=False)
    quant, options = None, {}
    if case.get("quant"):
        options = {"blocksize": case.get("blocksize", 64), "quant_dtype": weight.dtype}
        weight, quant = _nf4.quantize(weight, case.get("quant"), options["blocksize"], case.get("double", True))
    return options | {
        "x": make.normal(T, K, grad=True),
        "weight": weight,
        "quant": quant,
        "a": make.normal(R, K, std=K**-0.5, role="adapter", grad=True, wide=False),
        "b": make.normal(N, R, std=R**-0.5, role="adapter", grad=True, wide=False),
        "bias": make.normal(N, grad=True) if case.get("bias") else None,
        "lora_bias": make.normal(N, role="adapter", grad=True) if case.get("lora_bias") else None,
        "base": make.normal(T, N, grad=True) if base else None,
        "seed": make.seed() if p else None,
        "scale": 1.0,
        "p": p,
    }


# Plans beside the default one.
PLANS = tuple(plan for plan in _lora_plan.PLANS if plan != _lora_plan.DEFAULT)


@contextlib.contextmanager
def planned(name: str, kw: dict) -> Iterator[dict]:
    """Inside, the op's kernels follow that plan; yields the arguments to call it with."""
    with _lora_plan.use_plan(name):
        yield packed_copies(kw) if name == "packed" else kw


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x."""
    cut = {name: kw[name].detach()[:rows].requires_grad_() for name in ("x", "base") if kw[name] is not None}
    return kw | cut


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "branch dropped": lambda kw: kw | {"scale": 0.0},
    "branch halved": lambda kw: kw | {"scale": kw["scale"] / 2},
    "bias dropped": lambda kw: kw | {"bias": kw["bias"] * 0} if kw["bias"] is not None else None,
    "lora_bias halved": lambda kw: kw | {"lora_bias": kw["lora_bias"] / 2} if kw["lora_bias"] is not None else None,
    "another mask": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["seed"] is not None else None,
    "no mask": lambda kw: kw | {"p": 0.0} if kw["p"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two; frozen weight, all of x, a, b needing gradients."""
    T, K, N, R = (case[d] for d in "TKNR")
    plain = 0 if case.get("base") else 2 * T * K * N
    branch = 2 * T * R * (K + N)
    weight = plain if case.get("train_weight") else 0
    return {"forward": plain + branch, "backward": plain + weight + 2 * branch}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument read once and each result written once."""
    T, K, N, R = (case[d] for d in "TKNR")
    weights = (_packed_bytes(case) or itemsize * N * K) + itemsize * R * (K + N)
    return {
        "forward": itemsize * (T * K + T * N) + weights,
        "backward": itemsize * (T * N + T * K + T * K + R * (K + N)) + weights,
    }


def _packed_bytes(case: Case) -> int:
    """What is read of a 4-bit weight, the codes and absmax; of the nested code what the blocks name."""
    if not case.get("quant"):
        return 0
    return _lora_bytes.packed_bytes(case["N"], case["K"], case.get("blocksize", 64), case.get("double", True))


def _product_bytes(case: Case, e: int, bias: int) -> dict[str, int]:
    """x Wᵀ + bias, and dy W."""
    T, K, N = (case[d] for d in "TKN")
    forward = e * (T * K + N * K + T * N) + bias
    backward = e * (T * N + N * K + T * K)
    if not case.get("quant"):
        return {"forward": forward, "backward": backward}
    dequantise = _packed_bytes(case) + e * N * K
    if _nf4_triton.fused_reason(T, (N, K)) is not None:
        # once: backward finds the weight where forward left it
        return {"forward": forward + dequantise, "backward": backward}
    splits = _nf4_triton.config(T, (N, K), case.get("blocksize", 64), _dtype(e), arch(torch.empty(0))).splits
    fused = e * T * K + _packed_bytes(case) + bias + _partial(splits, T * N, e)
    return {"forward": fused, "backward": backward + dequantise}


def plan_floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """floor_bytes where s comes before y and ds before dx: x is read again for s, and dy for ds.

    The only way below is to compute s once more for every block of columns of y, R / columns of the product's FLOPs.
    """
    fewest = floor_bytes(case, itemsize)
    return {
        "forward": fewest["forward"] + itemsize * case["T"] * case["K"],
        "backward": fewest["backward"] + itemsize * case["T"] * case["N"],
    }


def bytes_moved(case: Case, itemsize: int, plan: str = _lora_plan.DEFAULT) -> dict[str, int]:
    """Bytes that a Triton plan moves, tile re-reads served by the cache left out; one dtype throughout.

    A test holds this to the count of masked loads, stores and ATen operands.
    """
    T, K, N, R = (case[d] for d in "TKNR")
    tiles = _config(case, itemsize)
    base, e = case.get("base", False), itemsize
    mask = 8 if case.get("p") else 0
    vector = e * N
    biases = vector * bool(case.get("bias")), vector * bool(case.get("lora_bias"))

    plan = _lora_plan.DEFAULT if base or case.get("quant") else plan

    product = _product_bytes(case, e, biases[0])
    forward = e * (T * K + R * K) + mask
    if plan == "packed":
        # x copied; s, through fp32 partial sums, once for backward and once scaled beside x
        splits = tiles.packed.splits
        forward += e * (T * K + 2 * T * R) + (8 * splits * T * R if splits > 1 else 0)
        forward += e * (T * (K + R) + N * (K + R) + T * N) + _bias_bytes(case, e)
    else:
        forward += _partial(tiles.down.splits, T * R, e) + e * (T * R + N * R) + biases[1]
        # the second source of the product, or an update of its result
        forward += (0 if base else product["forward"]) + (0 if plan == "two_source" else 2 * e * T * N)

    backward = 0 if base else product["backward"]
    if base:
        backward += 2 * e * T * N  # dbase, a copy of dy
    if case.get("train_weight"):
        backward += e * (T * N + T * K + N * K)
    if any(biases):
        backward += e * T * N + 4 * N + sum(4 * N + size for size in biases if size) + 8 * N * bool(biases[1])
    if plan == "packed":
        backward += e * (N * R + T * R)  # dy B, beside dy W
        backward += 2 * e * T * R + e * (T * N + T * R) + _partial(tiles.outer_dy.splits, N * R, e)
    elif tiles.up is not None:
        blocks = triton.cdiv(N, tiles.up.cols)
        backward += e * (T * N + N * R + T * R)
        backward += _partial(blocks, T * R, e) + _partial(tiles.up.splits, N * R, e)
    else:
        backward += e * (T * N + N * R) + _partial(tiles.down_dy.splits, T * R, e)
        backward += e * (T * N + T * R) + _partial(tiles.outer_dy.splits, N * R, e)
    backward += e * (T * K + T * R) + mask + _partial(tiles.outer_x.splits, K * R, e)
    backward += e * (T * R + K * R) + mask
    if plan != "two_source":
        backward += e * T * K * (1 if base else 2)  # masked update of dx
    return {"forward": forward, "backward": backward}


def _bias_bytes(case: Case, e: int) -> int:
    """bias + scale * lora_bias made of both, and read by the product."""
    N, bias = case["N"], bool(case.get("bias"))
    if not case.get("lora_bias"):
        return e * N * bias
    cast = 0 if e == 4 else 4 + e
    return N * ((1 + bias) * cast + 8 + 12 * bias + cast) + e * N


def _partial(splits: int, size: int, itemsize: int) -> int:
    """Writing a result, through fp32 partial sums when it has several."""
    return itemsize * size + (8 * splits * size if splits > 1 else 0)


def _config(case: Case, itemsize: int) -> Config:
    return config(Dims(*(case[d] for d in "TKNR")), _dtype(itemsize), arch(torch.empty(0)))


def _dtype(itemsize: int) -> torch.dtype:
    return torch.float32 if itemsize == 4 else torch.bfloat16
