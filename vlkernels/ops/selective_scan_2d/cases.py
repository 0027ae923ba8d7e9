"""Shapes of selective_scan_2d, for tests and benchmarks alike."""

from __future__ import annotations

import torch
import triton

from ...testing.case import Case, Make
from .._device import arch
from .reference import chunk_length
from .triton import config


def _case(name, B, H, W, D, S, scan, G=1, tags=(), recipe="", **options) -> Case:
    """T = B H W tokens. Options: scan; d, z, state: whether given; delta_bias, softplus: True unless said."""
    dims = {"T": B * H * W, "H": H, "W": W, "D": D, "S": S, "G": G}
    return Case(name, dims, {"scan": scan, **options}, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32")

CASES = (
    # what a direction can have, at once; few steps, for the interpreter takes each of them by itself
    _case("everything", 3, 2, 2, 5, 6, "cR", d=True, state=True, tags=("all-precisions", "sharp")),
    _case("gated", 1, 4, 1, 6, 3, "r", d=True, z=True, tags=("sharp",)),
    # two chunks, the second of one token
    _case("chunks", 1, 5, 5, 7, 4, "C"),
    _case("four directions", 1, 2, 3, 7, 2, "rcRC", d=True),
    _case("grouped", 1, 3, 1, 68, 3, "R", G=2, delta_bias=False, softplus=False),
    _case("mamba L4 B32", 32, 4, 1, 32, 4, "r", d=True, z=True, tags=("bench",),
          recipe="so short that its bytes can be counted at full size"),
    *(
        # a program of the interpreter takes minutes for each of these
        _case(name, B, H, W, D, S, scan, d=True, tags=("bench", "uncounted"), recipe=recipe, **options)
        for name, B, H, W, D, S, scan, recipe, options in (
            ("csm 24x24 B8", 8, 24, 24, 2048, 16, "rcRC", "VL-Mamba's connector on CLIP's tokens", {}),
            ("csm 27x27 B8", 8, 27, 27, 2304, 16, "rcRC", "VL-Mamba's connector on SigLIP's tokens", {}),
            ("bsm 27x27 B8", 8, 27, 27, 2304, 16, "rrRR", "VL-Mamba's connector on SigLIP's tokens", {}),
            ("csm 56x56 S1 B16", 16, 56, 56, 192, 1, "rcRC", "VMamba's first stage, one state", {}),
            ("mamba L2048 B4", 4, 2048, 1, 5120, 16, "r", "a layer of Mamba-2.8B", {"z": True}),
        )
    ),
)  # fmt: skip


def inputs(case: Case, make: Make) -> dict:
    """Arguments of selective_scan_2d; every additive term is at least 30 % of the output's scale."""
    H, W, D, S, G = (case[n] for n in ("H", "W", "D", "S", "G"))
    B, L, K, trained = max(1, case["T"] // (H * W)), H * W, len(case.get("scan")), not case.get("frozen", False)
    a = make.normal(K * D, S, std=0.5, role="adapter").exp().neg().requires_grad_(trained)
    delta = make.normal(B, L, K, D, grad=True)
    if not case.get("softplus", True):
        delta = delta.detach().abs().requires_grad_()  # a step back in time would let the states grow
    return {
        "u": make.normal(B, L, D, grad=True),
        "delta": delta,
        "a": a,
        "b": make.normal(B, L, K, G, S, grad=True),
        "c": make.normal(B, L, K, G, S, grad=True),
        "d": make.normal(K * D, role="adapter", grad=trained) if case.get("d") else None,
        "z": make.normal(B, L, D, grad=True) if case.get("z") else None,
        "delta_bias": make.normal(K * D, role="adapter", grad=trained) if case.get("delta_bias", True) else None,
        "state": make.normal(B, K, D, S, grad=True) if case.get("state") else None,
        "height": H,
        "width": W,
        "scan": case.get("scan"),
        "softplus": case.get("softplus", True),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first images: one for every ten rows begun."""
    images = -(-rows // 10)

    def cut(t):
        return t.detach()[:images].contiguous().requires_grad_(t.requires_grad)

    names = ("u", "delta", "b", "c", "z", "state")
    return kw | {n: cut(kw[n]) for n in names if kw[n] is not None}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "skip dropped": _scaled("d", 0.0),
    "bias dropped": _scaled("delta_bias", 0.0),
    "state dropped": _scaled("state", 0.0),
    "decay halved": _scaled("a", 0.5),
    "gate halved": _scaled("z", 0.5),
    "no softplus": lambda kw: kw | {"softplus": False} if kw["softplus"] else None,
    "rows for columns": lambda kw: kw | {"scan": kw["scan"].replace("c", "r")} if "c" in kw["scan"] else None,
    "one way only": lambda kw: kw | {"scan": kw["scan"].replace("R", "r")} if "R" in kw["scan"] else None,
}


def flops(case: Case) -> dict[str, int]:
    """Of the matrix products: there are none."""
    return {"forward": 0, "backward": 0}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    p = _parts(case, itemsize)
    forward = p["in"] + p["y"] + p["last"] + p["states"]
    return {"forward": forward, "backward": p["y"] + p["last"] + p["states"] + 2 * p["in"]}


def _parts(case: Case, e: int) -> dict[str, int]:
    """Bytes of what both passes handle."""
    H, W, D, S, G = (case[n] for n in ("H", "W", "D", "S", "G"))
    B, L, K = max(1, case["T"] // (H * W)), H * W, len(case.get("scan"))
    states = B * K * D * S
    return {
        "y": e * B * L * D,
        "directions": (4 * K if K > 1 else e) * B * L * D,
        "steps": 2 * B * L * K * G * S,  # elements of b and c
        "last": 4 * states,
        "states": 4 * states * (-(-L // chunk_length(L)) - 1),
        "in": e * (
            B * L * D * (1 + K + bool(case.get("z"))) + 2 * B * L * K * G * S + K * D * S
            + K * D * (bool(case.get("d")) + case.get("delta_bias", True)) + states * bool(case.get("state"))
        ),
    }  # fmt: skip


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    H, W, D, S, G, e = *(case[n] for n in ("H", "W", "D", "S", "G")), itemsize
    B, L, K, p = max(1, case["T"] // (H * W)), H * W, len(case.get("scan")), _parts(case, itemsize)
    merge = p["directions"] + p["y"] if K > 1 else 0
    forward = p["in"] + p["directions"] + p["last"] + p["states"] + merge

    tiles = config(S, D // G, arch(torch.empty(0)))
    blocks = triton.cdiv(D // G, tiles.channels)
    marks = min(chunk_length(L), -(-L // tiles.fine) * tiles.fine) // tiles.fine
    scratch = 2 * 4 * B * K * G * blocks * marks * triton.next_power_of_2(S) * tiles.channels
    # y's gradient and the last state's; du, ddelta, dz
    backward = p["in"] + p["y"] + p["last"] + p["states"] + scratch + p["directions"] + merge
    backward += e * B * L * D * (K + bool(case.get("z")))
    backward += 4 * blocks * p["steps"] + 2 * p["last"] + 2 * 4 * B * K * D
    rounded = 0 if e == 4 else 4 + e

    def added(parts: int, elements: int) -> int:
        return (4 * (parts + 1) if parts > 1 else 0) * elements + rounded * elements

    vectors = bool(case.get("d")) + case.get("delta_bias", True)
    backward += added(blocks, p["steps"]) + added(B, K * D * S) + vectors * added(B, K * D)
    if case.get("state"):
        backward += rounded * B * K * D * S
    return {"forward": forward, "backward": backward}
