"""Shapes of lora_qkv, for tests and benchmarks alike."""

from __future__ import annotations

from ...testing.case import Case, Make
from .. import _lora_bytes, _nf4
from .._lora_bytes import Shape
from .reference import NAMES


def _case(name, T, K, N, ranks, tags=(), recipe="", **options) -> Case:
    """N: width of q; options: kv (width of k and v, default N), ranks of q, k, v with 0 for no adapter."""
    return Case(name, {"T": T, "K": K, "N": N}, {"ranks": ranks, **options}, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "amp-bf16", "bf16+fp32 amp")

_COUNTED = ("7b r128 p0.05 M8192", "7b r128 p0.05 norm")


def _bench(name: str) -> tuple[str, ...]:
    return ("bench",) if name in _COUNTED else ("bench", "uncounted")


CASES = (
    # every term at once: grouped keys and values, three ranks, dropout, biases, the norm
    _case("everything", 70, 75, 72, (5, 17, 3), kv=24, p=0.1, bias=True, lora_bias=True, norm=True,
          tags=("all-precisions", "sharp")),
    _case("plain-x", 66, 40, 48, (16, 16, 16), kv=16, p=0.05, tags=("all-precisions",)),
    _case("q-and-v", 37, 40, 56, (6, 0, 6), kv=24, p=0.25),
    _case("k-alone", 37, 40, 24, (0, 4, 0), norm=True),
    # partial sums over rows and over columns of x; ranks past 32 read dy twice
    _case("many-rows", 330, 24, 20, (33, 40, 2)),
    _case("long-row", 20, 900, 40, (8, 8, 8), p=0.1),
    _case("train-weights", 33, 40, 24, (4, 4, 4), bias=True, train_weight=True),
    # odd widths: the product takes the dequantised weight however few rows there are
    _case("nf4", 37, 43, 30, (3, 0, 5), kv=21, p=0.1, bias=True, quant="nf4", tags=("all-precisions",)),
    _case("nf4-few-rows", 9, 64, 24, (2, 4, 2), quant="nf4", blocksize=32),
    _case("gemma-norm", 21, 32, 24, (4, 4, 4), norm=True, offset=1.0),
    *(
        _case(name, T, K, N, (R, R, R), _bench(name), recipe, p=p, kv=kv, **more)
        for name, T, K, N, kv, R, p, more, recipe in (
            ("7b r128 p0.05 M8192", 8192, 4096, 4096, 4096, 128, 0.05, {}, "LLaVA-1.5-7B LoRA q, k, v"),
            ("7b r128 p0 M8192", 8192, 4096, 4096, 4096, 128, 0.0, {}, "LLaVA-1.5-7B LoRA q, k, v, dropout 0"),
            ("7b r128 p0.05 norm", 8192, 4096, 4096, 4096, 128, 0.05, {"norm": True}, "with input_layernorm"),
            ("8b gqa r64 p0.05 M8192", 8192, 4096, 4096, 1024, 64, 0.05, {}, "Llama-3-8B, Mistral-7B q, k, v"),
            ("7b nf4 r64 p0.05 M8192", 8192, 4096, 4096, 4096, 64, 0.05, {"quant": "nf4"}, "QLoRA q, k, v"),
            ("qwen2-7b r16 p0 M8192", 8192, 3584, 3584, 512, 16, 0.0, {"bias": True}, "Qwen2-VL-7B q, k, v"),
        )
    ),
)  # fmt: skip


def _shapes(case: Case) -> list[Shape]:
    widths = (case["N"], *[case.get("kv", case["N"])] * 2)
    bias, lora_bias = bool(case.get("bias")), bool(case.get("lora_bias"))
    blocksize = case.get("blocksize", 64) if case.get("quant") else 0
    return [Shape(N, R, bias, lora_bias and R > 0, blocksize) for N, R in zip(widths, case.get("ranks"), strict=True)]


def inputs(case: Case, make: Make) -> dict:
    """Arguments of lora_qkv; every additive term is at least 30 % of the output's scale."""
    T, K = case["T"], case["K"]
    kw: dict = {"x": make.normal(T, K, grad=True)}
    for name, s in zip(NAMES, _shapes(case), strict=True):
        weight, quant = make.normal(s.N, K, std=K**-0.5, grad=bool(case.get("train_weight")), wide=False), None
        if s.blocksize:
            kw |= {"blocksize": s.blocksize, "quant_dtype": weight.dtype}
            weight, quant = _nf4.quantize(weight, case.get("quant"), kw["blocksize"], True)
        kw |= {f"{name}_weight": weight, f"{name}_quant": quant}
        low = {"role": "adapter", "grad": True, "wide": False}
        kw[f"{name}_a"] = make.normal(s.R, K, std=K**-0.5, **low) if s.R else None
        kw[f"{name}_b"] = make.normal(s.N, s.R, std=s.R**-0.5, **low) if s.R else None
        kw[f"{name}_bias"] = make.normal(s.N, grad=True) if s.bias else None
        kw[f"{name}_lora_bias"] = make.normal(s.N, role="adapter", grad=True) if s.lora_bias else None
        kw[f"{name}_scale"] = 1.0
    kw["norm_weight"] = make.normal(K, grad=True) if case.get("norm") else None
    count = sum(R > 0 for R in case.get("ranks"))
    p = case.get("p", 0.0)
    kw["seed"] = make.seed(count) if p else None
    return kw | {"p": p, "offset": case.get("offset", 0.0)}


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x."""
    return kw | {"x": kw["x"].detach()[:rows].requires_grad_()}


def _none_if_missing(name: str, change):
    return lambda kw: kw | {name: change(kw[name])} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "q branch dropped": lambda kw: kw | {"q_scale": 0.0},
    "k branch halved": lambda kw: kw | {"k_scale": 0.5},
    "v branch halved": lambda kw: kw | {"v_scale": 0.5},
    "q and k adapters exchanged": lambda kw: kw | {"seed": kw["seed"][[1, 0, 2]]} if kw["seed"] is not None else None,
    "k bias dropped": _none_if_missing("k_bias", lambda t: t * 0),
    "v lora_bias halved": _none_if_missing("v_lora_bias", lambda t: t / 2),
    "norm's weight halved": _none_if_missing("norm_weight", lambda t: t / 2),
    "another mask": _none_if_missing("seed", lambda t: t + 1),
    "no mask": lambda kw: kw | {"p": 0.0, "seed": None} if kw["p"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two; frozen weights, all of x, a, b needing gradients."""
    T, K = case["T"], case["K"]
    plain = sum(2 * T * K * s.N for s in _shapes(case))
    branch = sum(2 * T * s.R * (K + s.N) for s in _shapes(case))
    weights = plain if case.get("train_weight") else 0
    return {"forward": plain + branch, "backward": plain + weights + 2 * branch}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument read once and each result written once."""
    T, K = case["T"], case["K"]
    out = sum(s.N for s in _shapes(case))
    low = sum(s.R * (K + s.N) for s in _shapes(case))
    weights = sum(s.weight_bytes(K, itemsize) for s in _shapes(case))
    return {
        "forward": weights + itemsize * (T * K + low + T * out),
        "backward": weights + itemsize * (T * out + T * K + low + T * K + low),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; a test holds this to the count of masked loads, stores and ATen operands."""
    T, K, e = case["T"], case["K"], itemsize
    shapes, dropout = _shapes(case), bool(case.get("p"))
    moved = {
        "forward": _lora_bytes.forward(T, K, shapes, e, dropout),
        "backward": _lora_bytes.backward(T, K, shapes, e, dropout),
    }
    if case.get("train_weight"):
        moved["backward"] += sum(e * (T * s.N + T * K + s.N * K) for s in shapes)
    if case.get("norm"):
        for direction, extra in _lora_bytes.norm(T, K, e).items():
            moved[direction] += extra
    return moved
