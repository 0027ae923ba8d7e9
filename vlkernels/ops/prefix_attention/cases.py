"""Shapes of prefix_attention, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._device import arch
from .triton import Dims, config


def _case(name, B, L, P, H, K, G=0, tags=(), recipe="", **options) -> Case:
    """T = B L queries in all. Options: shared, one prefix for the batch; one_gate, for all heads; factor, there is one;
    heads_first, o and q lie as (B, H, L, K); frozen, the prefix and the gate get no gradient; the rest as the op's."""
    return Case(name, {"T": B * L, "L": L, "P": P, "H": H, "K": K, "G": G or H}, options, frozenset(tags), recipe)


# bf16+fp32: float32 gates over a half-precision model
PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "amp-bf16")

CASES = (
    # every term at once: LLaMA-Adapter v2 with grouped heads
    _case("everything", 2, 33, 5, 2, 12, G=1, factor=True, tags=("all-precisions", "sharp")),
    # LLaMA-Adapter v1
    _case("shared", 2, 35, 10, 2, 16, shared=True, heads_first=True),
    # peft's AdaptionPrompt, grouped
    _case("one-gate", 2, 9, 7, 4, 8, G=2, shared=True, one_gate=True, tanh=False, scale=0.3),
    _case("one-row", 2, 19, 1, 2, 8, factor=True),
    _case("longest", 1, 70, 64, 1, 128, one_gate=True),
    _case("frozen", 2, 9, 3, 2, 6, frozen=True),
    *(
        _case(name, B, L, P, H, K, G, tags=("bench", *(("uncounted",) if slow else ())), recipe=recipe, **options)
        for name, B, L, P, H, K, G, recipe, options, slow in (
            ("llama-adapter B8", 8, 512, 10, 32, 128, 32, "LLaMA-Adapter 7B, 512 tokens",
             {"shared": True, "heads_first": True}, False),
            ("llama-adapter-v2 B8", 8, 512, 10, 32, 128, 32, "LLaMA-Adapter v2 multimodal 7B, a prefix an image",
             {"factor": True, "heads_first": True}, False),
            ("adaption-prompt mistral B8", 8, 1024, 10, 32, 128, 8, "peft's AdaptionPrompt on Mistral 7B",
             {"shared": True, "one_gate": True, "tanh": False}, False),
            ("long prefix B4", 4, 2048, 64, 32, 128, 8, "64 rows an image on Llama-3 8B", {}, True),
            ("head dim 64 B8", 8, 512, 30, 16, 64, 16, "a decoder of width 1024", {"shared": True}, True),
            ("decode B16", 16, 1, 10, 32, 128, 32, "one token of 16 samples", {"shared": True}, True),
        )
    ),
)  # fmt: skip


def _batch(case: Case) -> tuple[int, int]:
    """B, and L: of fewer queries than one sample has, one sample with these."""
    L = min(case["L"], max(case["T"], 1))
    return -(-case["T"] // L), L


def inputs(case: Case, make: Make) -> dict:
    """Arguments of prefix_attention; what the prefix adds is at least 30 % of the output's scale."""
    (B, L), P, H, K, G = _batch(case), case["P"], case["H"], case["K"], case["G"]
    S, trained = 1 if case.get("shared") else B, not case.get("frozen")

    def rows():
        if case.get("heads_first"):
            t = make.normal(B, H, L, K)
            return t.transpose(1, 2).requires_grad_()
        return make.normal(B, L, H, K, grad=True)

    return {
        "o": rows(),
        "q": rows(),
        "k": make.normal(S, P, G, K, grad=trained),
        # the softmax averages P values
        "v": make.normal(S, P, G, K, std=max(1.0, P**0.5 / 2), grad=trained),
        "gate": make.normal(1 if case.get("one_gate") else H, role="adapter", grad=trained),
        "factor": make.normal(1, role="adapter", grad=trained) if case.get("factor") else None,
        "scale": case.get("scale", 0.0),
        "tanh": case.get("tanh", True),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments with the first `rows` queries of each sample."""
    return kw | {n: kw[n].detach()[:, :rows].contiguous().requires_grad_(kw[n].requires_grad) for n in ("o", "q")}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "prefix halved": _scaled("v", 0.5),
    "o dropped": _scaled("o", 0.0),
    "scores halved": _scaled("q", 0.5),
    "gate halved": _scaled("gate", 0.5),
    "factor halved": _scaled("factor", 0.5),
    "no tanh": lambda kw: kw | {"tanh": False} if kw["tanh"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products; the backward computes the scores once more."""
    product = 2 * case["T"] * case["H"] * case["P"] * case["K"]
    return {"forward": 2 * product, "backward": (3 if case.get("frozen") else 5) * product}


def padding(case: Case) -> float:
    """What the products compute over what is asked for: tiles of queries, prefix rows and head dims."""
    tiles, L = _tiles(case, 2), _batch(case)[1]

    def filled(name: str) -> float:
        return max(16, 2 ** (case[name] - 1).bit_length()) / case[name]

    rows = max(-(-L // block) * block for block in (tiles.l, tiles.back_l)) / L
    return rows * filled("P") * filled("K")


def _tiles(case: Case, itemsize: int):
    (B, L), dtype = _batch(case), torch.float32 if itemsize == 4 else torch.bfloat16
    S = 1 if case.get("shared") else B
    return config(Dims(B * L, L, case["P"], S, case["H"], case["G"], case["K"]), dtype, arch(torch.empty(0)), dtype)


def _sizes(case: Case, e: int) -> tuple[int, int, int]:
    """Bytes of q (or o, y), of the prefix's keys and values, of gate and factor."""
    (B, L), S = _batch(case), 1 if case.get("shared") else _batch(case)[0]
    gates = e * ((1 if case.get("one_gate") else case["H"]) + bool(case.get("factor")))
    return e * B * L * case["H"] * case["K"], 2 * e * S * case["P"] * case["G"] * case["K"], gates


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once; o's gradient is y's."""
    rows, prefix, gates = _sizes(case, itemsize)
    trained = not case.get("frozen")
    return {"forward": 3 * rows + prefix + gates, "backward": 3 * rows + (1 + trained) * (prefix + gates)}


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    rows, prefix, gates = _sizes(case, itemsize)
    found = floor_bytes(case, itemsize)
    if not case.get("frozen"):
        tiles, (B, L) = _tiles(case, itemsize), _batch(case)
        parts = 4 * (prefix // itemsize) * tiles.splits
        # gate and factor are read by both kernels
        if not tiles.together:
            # one launch more for each of dk, which takes keys and values, and dv, which takes keys
            found["backward"] += 4 * rows + 3 * prefix // 2 + 2 * gates
        found["backward"] += 2 * parts + 8 * B * -(-L // tiles.back_l) * case["H"] + gates
    return found
