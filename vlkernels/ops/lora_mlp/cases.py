"""Shapes of lora_mlp, for tests and benchmarks alike."""

from __future__ import annotations

from ...testing.case import Case, Make
from .. import _lora_bytes, _nf4
from .._lora_bytes import Shape
from .reference import NAMES


def _case(name, T, K, F, ranks, tags=(), recipe="", **options) -> Case:
    """options: ranks of gate, up, down, 0 for no adapter; trained: what of the frozen tensors gets gradients."""
    return Case(name, {"T": T, "K": K, "F": F}, {"ranks": ranks, **options}, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "amp-bf16", "bf16+fp32 amp")

_COUNTED = ("7b r128 p0.05 M8192", "7b r128 p0.05 norm")


def _bench(name: str) -> tuple[str, ...]:
    return ("bench",) if name in _COUNTED else ("bench", "uncounted")


CASES = (
    # every term at once: three ranks, dropout, biases, the norm, the residual
    _case("everything", 66, 43, 72, (5, 17, 3), p=0.1, bias=True, lora_bias=True, norm=True, residual=True,
          tags=("all-precisions", "sharp")),
    _case("plain-x", 50, 40, 56, (16, 16, 16), p=0.05, tags=("all-precisions",)),
    # odd widths: the product takes the dequantised weight however few rows there are
    _case("nf4", 37, 27, 41, (3, 0, 5), p=0.1, bias=True, quant="nf4", tags=("all-precisions",)),
    _case("gemma", 33, 24, 40, (4, 4, 4), act="gelu_tanh", norm=True, offset=1.0, residual=True),
    _case("down-alone", 37, 24, 56, (0, 0, 6), p=0.25),
    _case("gate-and-up", 37, 24, 33, (6, 40, 0), act="gelu"),
    _case("train-weights", 33, 24, 40, (4, 4, 4), bias=True, train_weight=True),
    _case("many-rows", 330, 16, 20, (33, 2, 8)),
    *(
        _case(name, T, K, F, (R, R, R), _bench(name), recipe, p=p, **more)
        for name, T, K, F, R, p, more, recipe in (
            ("7b r128 p0.05 M8192", 8192, 4096, 11008, 128, 0.05, {}, "LLaVA-1.5-7B LoRA gate, up, down"),
            ("7b r128 p0 M8192", 8192, 4096, 11008, 128, 0.0, {}, "LLaVA-1.5-7B LoRA gate, up, down, dropout 0"),
            ("7b r128 p0.05 norm", 8192, 4096, 11008, 128, 0.05, {"norm": True, "residual": True},
             "with post_attention_layernorm and the residual"),
            ("8b r64 p0.05 M8192", 8192, 4096, 14336, 64, 0.05, {}, "Llama-3-8B, Mistral-7B gate, up, down"),
            ("7b nf4 r64 p0.05 M8192", 8192, 4096, 11008, 64, 0.05, {"quant": "nf4"}, "QLoRA gate, up, down"),
            ("gemma r16 p0 M8192", 8192, 3072, 24576, 16, 0.0, {"act": "gelu_tanh"}, "Gemma-7B, PaliGemma GeGLU"),
        )
    ),
)  # fmt: skip


def _shapes(case: Case) -> tuple[list[Shape], list[Shape]]:
    """gate and up; down."""
    bias, lora_bias = bool(case.get("bias")), bool(case.get("lora_bias"))
    widths = (case["F"], case["F"], case["K"])
    blocksize = case.get("blocksize", 64) if case.get("quant") else 0
    gate, up, down = (
        Shape(N, R, bias, lora_bias and R > 0, blocksize) for N, R in zip(widths, case.get("ranks"), strict=True)
    )
    return [gate, up], [down]


def inputs(case: Case, make: Make) -> dict:
    """Arguments of lora_mlp; every additive term is at least 30 % of the output's scale."""
    T, K, F = (case[d] for d in "TKF")
    gate_up, down = _shapes(case)
    kw: dict = {"x": make.normal(T, K, grad=True)}
    for name, s, width in zip(NAMES, gate_up + down, (K, K, F), strict=True):
        low = {"role": "adapter", "grad": True, "wide": False}
        trained = bool(case.get("train_weight"))
        weight, quant = make.normal(s.N, width, std=width**-0.5, grad=trained, wide=False), None
        if s.blocksize:
            kw |= {"blocksize": s.blocksize, "quant_dtype": weight.dtype}
            weight, quant = _nf4.quantize(weight, case.get("quant"), s.blocksize, True)
        kw |= {f"{name}_weight": weight, f"{name}_quant": quant}
        kw[f"{name}_a"] = make.normal(s.R, width, std=width**-0.5, **low) if s.R else None
        kw[f"{name}_b"] = make.normal(s.N, s.R, std=s.R**-0.5, **low) if s.R else None
        kw[f"{name}_bias"] = make.normal(s.N, grad=True) if s.bias else None
        kw[f"{name}_lora_bias"] = make.normal(s.N, role="adapter", grad=True) if s.lora_bias else None
        kw[f"{name}_scale"] = 1.0
    kw["norm_weight"] = make.normal(K, grad=True) if case.get("norm") else None
    count, p = sum(R > 0 for R in case.get("ranks")), case.get("p", 0.0)
    kw["seed"] = make.seed(count) if p else None
    plain = {"act": "silu", "offset": 0.0, "residual": False}
    return kw | {"p": p} | {name: case.get(name, default) for name, default in plain.items()}


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x."""
    return kw | {"x": kw["x"].detach()[:rows].requires_grad_()}


def _changed(name: str, change):
    return lambda kw: kw | {name: change(kw[name])} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "gate branch dropped": lambda kw: kw | {"gate_scale": 0.0},
    "up branch halved": lambda kw: kw | {"up_scale": 0.5},
    "down branch halved": lambda kw: kw | {"down_scale": 0.5},
    "gate bias dropped": _changed("gate_bias", lambda t: t * 0),
    "down bias dropped": _changed("down_bias", lambda t: t * 0),
    "up lora_bias halved": _changed("up_lora_bias", lambda t: t / 2),
    "norm's weight halved": _changed("norm_weight", lambda t: t / 2),
    "residual dropped": lambda kw: kw | {"residual": False} if kw["residual"] else None,
    "another activation": lambda kw: kw | {"act": "relu"},
    "another mask": _changed("seed", lambda t: t + 1),
    "no mask": lambda kw: kw | {"p": 0.0, "seed": None} if kw["p"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two; frozen weights, all of x, a, b needing gradients."""
    T, K, F = (case[d] for d in "TKF")
    gate_up, down = _shapes(case)
    both = [(s, K) for s in gate_up] + [(s, F) for s in down]
    plain = sum(2 * T * width * s.N for s, width in both)
    branch = sum(2 * T * s.R * (width + s.N) for s, width in both)
    weights = plain if case.get("train_weight") else 0
    return {"forward": plain + branch, "backward": plain + weights + 2 * branch}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument read once, each result and each activation that a product needs whole written and read once."""
    T, K, F = (case[d] for d in "TKF")
    gate_up, down = _shapes(case)
    low = sum(s.R * (K + s.N) for s in gate_up) + sum(s.R * (F + s.N) for s in down)
    weights = sum(s.weight_bytes(K, itemsize) for s in gate_up) + down[0].weight_bytes(F, itemsize)
    return {
        # gate, up and their product are written; the product is read by down
        "forward": weights + itemsize * (T * K + low + 4 * T * F + T * K),
        # dy, x, gate, up read; dgate, dup written and read; dx written
        "backward": weights + itemsize * (2 * T * K + low + 6 * T * F + T * K + low),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; a test holds this to the count of masked loads, stores and ATen operands."""
    (T, K, F), e = (case[d] for d in "TKF"), itemsize
    (gate_up, down), dropout = _shapes(case), bool(case.get("p"))
    moved = {
        "forward": _lora_bytes.forward(T, K, gate_up, e, dropout) + _lora_bytes.forward(T, F, down, e, dropout),
        "backward": _lora_bytes.backward(T, K, gate_up, e, dropout) + _lora_bytes.backward(T, F, down, e, dropout),
    }
    trained = bool(case.get("train_weight"))
    moved["forward"] += 3 * e * T * F
    moved["backward"] += 5 * e * T * F + (3 * e * T * F if trained or down[0].R else 0)
    if trained:
        moved["backward"] += sum(e * (T * s.N + T * K + s.N * K) for s in gate_up) + e * (T * K + T * F + K * F)
    if case.get("norm"):
        for direction, extra in _lora_bytes.norm(T, K, e).items():
            moved[direction] += extra
    if case.get("residual"):
        moved["forward"] += 3 * e * T * K
        moved["backward"] += 3 * e * T * K
    return moved
