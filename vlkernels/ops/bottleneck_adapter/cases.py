"""Shapes of bottleneck_adapter, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._device import arch
from .triton import MAX_RANK, Dims, config


def _case(name, B, L, D, R, tags=(), recipe="", N=None, E=0, **options) -> Case:
    """B samples of L tokens, T in all; E experts, 0 without a route.

    gate: "element", "row", "sample", "channel", "scalar"; biases, affine (the norm's weight), centre (its bias); adds:
    base and residual.
    """
    dims = {"T": B * L, "L": L, "D": D, "R": R, "N": N or D} | ({"E": E} if E else {})
    return Case(name, dims, {"biases": True, "adds": (), **options}, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

_BOTH = ("base", "residual")

CASES = (
    # every term at once, a gate of each element as VL-PET's
    _case("everything", 3, 11, 24, 12, norm="layer", centre=True, act="gelu_tanh", p=0.25, gate="element", sigmoid=True,
          skip="gated", scale=0.7, adds=_BOTH, tags=("all-precisions", "sharp")),
    _case("routed", 4, 9, 20, 8, E=2, act="none", p=0.25, norm="rms", gate="row", scale=1.3,
          tags=("all-precisions", "sharp")),
    _case("channels", 2, 17, 40, 20, gate="channel", sigmoid=True, skip="gated", act="silu", adds=("residual",)),
    _case("samples", 3, 7, 24, 5, N=18, skip="none", gate="sample", norm="layer", act="gelu", adds=("base",)),
    _case("learned scaling", 1, 37, 72, 33, gate="scalar", adds=_BOTH),
    _case("plain", 1, 21, 40, 16, biases=False, tags=("all-precisions",)),
    # more than one kernel holds: products on cuBLAS
    _case("large", 3, 7, 20, 260, norm="layer", gate="row", skip="gated", p=0.1, tags=("all-precisions",)),
    _case("large, elements", 2, 9, 16, 260, gate="element", sigmoid=True, adds=("base",)),
    _case("frozen", 2, 9, 24, 12, frozen=True, norm="layer", gate="channel"),
    _case("frozen x", 2, 9, 24, 12, frozen_x=True, norm="layer", centre=True),
    _case("vl-pet bart B64", 64, 92, 768, 96, act="gelu_tanh", gate="element", sigmoid=True, skip="gated",
          adds=("residual",), tags=("bench",), recipe="VL-PET-large in BART's encoder, 64 x (36 boxes, 56 words)"),
    _case("vl-pet t5 B64", 64, 92, 768, 192, act="gelu_tanh", gate="element", sigmoid=True, skip="gated", scale=0.3,
          adds=("residual",), tags=("bench", "uncounted"), recipe="VL-PET-large in T5's encoder"),
    _case("houlsby B32", 32, 512, 1024, 64, act="silu", adds=("residual",), tags=("bench",),
          recipe="adapter-hub's double_seq_bn, BERT-large"),
    _case("frozenbilm B32", 32, 266, 1536, 192, p=0.1, norm="layer", centre=True, adds=("residual",),
          tags=("bench", "uncounted"), recipe="FrozenBiLM with its norm, DeBERTa-v2-xlarge, 10 frames and 256 words"),
    _case("magma scaled B16", 16, 400, 4096, 64, gate="scalar", skip="none", adds=("base",), tags=("bench",),
          recipe="MAGMA's scaled_parallel at factor 64"),
    _case("lavin-7b B8", 8, 512, 4096, 8, E=2, act="none", p=0.1, scale=1.0, tags=("bench",),
          recipe="LaVIN-7B's routed adapter"),
    _case("magma B16", 16, 400, 4096, 1024, tags=("bench", "uncounted"),
          recipe="MAGMA on GPT-J, factor 4, 16 x (144 of an image, 256 of text)"),
)  # fmt: skip


def samples(case: Case) -> tuple[int, int]:
    """B, L; of a number of rows that L does not divide, one sample."""
    T, L = case["T"], case["L"]
    return (T // L, L) if T % L == 0 else (1, T)


def inputs(case: Case, make: Make) -> dict:
    """Arguments of bottleneck_adapter; every additive term is at least 30 % of the output's scale."""
    (B, L), D, R, N, E = samples(case), *(case[d] for d in "DRN"), case.dims.get("E", 0)
    norm, trained, biases = case.get("norm", "none"), not case.get("frozen", False), case.get("biases")
    gates = {"element": (B, L, N), "row": (B, L, 1), "sample": (B, 1, 1), "channel": (N,), "scalar": (1,)}
    kind, adds = case.get("gate"), case.get("adds")
    affine = norm != "none"
    return {
        "x": make.normal(B, L, D, grad=not case.get("frozen_x")),
        "down": make.normal(R, D, std=D**-0.5, grad=trained, wide=False),
        "up": make.normal(N, max(1, E) * R, std=2 * R**-0.5, grad=trained, wide=False),
        "down_bias": make.normal(R, grad=trained) if biases else None,
        "up_bias": make.normal(*((E, N) if E else (N,)), grad=trained) if biases else None,
        "norm_weight": make.normal(D, grad=trained) if affine else None,
        "norm_bias": make.normal(D, grad=trained) if case.get("centre") else None,
        "base": make.normal(B, L, N, grad=True) if "base" in adds else None,
        "residual": make.normal(B, L, N, grad=True) if "residual" in adds else None,
        "gate": make.normal(*gates[kind], grad=True) if kind else None,
        "route": make.normal(B, E, grad=True) if E else None,
        "seed": make.seed() if case.get("p") else None,
        "act": case.get("act", "relu"),
        "norm": norm,
        "scale": case.get("scale", 1.0),
        "skip": case.get("skip", "add"),
        "gate_act": "sigmoid" if case.get("sigmoid") else "none",
        "p": case.get("p", 0.0),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on fewer samples, one for each ten rows."""
    count, gate = max(min(rows, 1), rows // 10), kw["gate"]
    names = ("x", "base", "residual", "route", *(("gate",) if gate is not None and gate.dim() == 3 else ()))
    return kw | {
        n: kw[n].detach()[:count].contiguous().requires_grad_(kw[n].requires_grad) for n in names if kw[n] is not None
    }


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


def _flipped(name: str, axis: int):
    return lambda kw: kw | {name: kw[name].detach().flip(axis).requires_grad_()} if kw[name] is not None else None


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "down_bias dropped": _scaled("down_bias", 0.0),
    "up_bias halved": _scaled("up_bias", 0.5),
    "norm_bias dropped": _scaled("norm_bias", 0.0),
    "norm_weight halved": _scaled("norm_weight", 0.5),
    "base dropped": _scaled("base", 0.0),
    "residual halved": _scaled("residual", 0.5),
    "gate turned": _flipped("gate", 0),
    "route turned": _flipped("route", 1),
    "no sigmoid": lambda kw: kw | {"gate_act": "none"},
    "x past the gate": lambda kw: kw | {"skip": "add"},
    "another activation": lambda kw: kw | {"act": "relu"},
    "another scale": lambda kw: kw | {"scale": 1.0},
    "another mask": lambda kw: kw | {"seed": kw["seed"] + 1},
}  # fmt: skip


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products; the first is run again in backward, with a gate of each element
    the second too."""
    T, D, N, ER = case["T"], case["D"], case["N"], case["R"] * max(1, case.dims.get("E", 0))
    first, second = 2 * T * D * ER, 2 * T * N * ER
    trained, need_x = not case.get("frozen", False), not case.get("frozen_x")
    weight = trained or case.get("gate") == "channel"
    backward = first * (1 + trained + need_x) + second * (1 + weight + (case.get("gate") == "element"))
    return {"forward": first + second, "backward": backward}


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument read once, each result written once; base's and residual's gradients are y's."""
    T, D, N, ER = case["T"], case["D"], case["N"], case["R"] * max(1, case.dims.get("E", 0))
    gates, weights = T * N * (case.get("gate") == "element"), case["R"] * D + N * ER
    trained, dx = not case.get("frozen", False), T * D * (not case.get("frozen_x"))
    return {
        "forward": itemsize * (T * D + weights + T * N * (1 + len(case.get("adds"))) + gates),
        "backward": itemsize * (T * N + T * D + dx + weights * (1 + trained) + 2 * gates),
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    sizes = _Sizes(case, itemsize)
    held = MAX_RANK[torch.float32 if itemsize == 4 else torch.bfloat16]
    return sizes.fused() if held >= sizes.ER else sizes.products()


class _Sizes:
    """What each pass of a case moves; names as in triton.py."""

    def __init__(self, case: Case, e: int):
        (self.B, _), self.T, self.D, self.R, self.N = samples(case), *(case[d] for d in "TDRN")
        self.E, self.e, self.kind = max(1, case.dims.get("E", 0)), e, case.get("gate")
        self.routed, self.ER, self.biases = "E" in case.dims, self.E * self.R, bool(case.get("biases"))
        gates = {"element": self.T * self.N, "row": self.T, "sample": self.B, "channel": self.N, "scalar": 1}
        self.gate = gates.get(self.kind, 0)
        self.shared = self.kind in ("row", "sample", "scalar")
        self.norm, self.layer = case.get("norm", "none") != "none", case.get("norm") == "layer"
        self.centre, self.sigmoid = bool(case.get("centre")), bool(case.get("sigmoid"))
        self.skip, self.adds = case.get("skip", "add"), len(case.get("adds"))
        self.trained, self.need_x = not case.get("frozen", False), not case.get("frozen_x")
        self.seed, self.route = 8 * bool(case.get("p")), self.B * self.E * self.routed
        self.bias_n = self.biases * self.E * self.N

    def cast(self, size: int) -> int:
        return (4 + self.e) * size if self.e != 4 else 0

    def fused(self) -> dict[str, int]:
        T, D, N, e, ER = self.T, self.D, self.N, self.e, self.ER
        vectors = self.biases * self.R + (self.norm + self.centre) * D
        shared = e * (T * D + self.R * D + N * ER + vectors + self.gate + self.route) + self.seed
        forward = shared + e * (self.bias_n + T * N * (1 + self.adds))
        dtype = torch.float32 if e == 4 else torch.bfloat16
        tiles = config(Dims(T, D, N, ER), dtype, arch(torch.empty(0)), dtype)
        scratch = self.trained or self.kind == "channel"
        backward = shared + e * T * N + e * T * D * self.need_x + scratch * (2 * e * T * ER + 8 * T * self.norm)
        if self.kind == "element" or self.shared:
            backward += e * self.bias_n + (e * T * N if self.kind == "element" else 4 * T + self.of_rows())
        if self.trained:
            parts = 4 * tiles.outer_x.splits * D * ER
            backward += e * (T * D + T * ER + self.R * D * (1 + self.norm) + D * 2 * (self.norm + self.centre))
            backward += 2 * parts
            backward += 4 * T * (self.norm + self.layer) + self.sums(T * ER)
        if scratch:
            parts, channel = 4 * tiles.outer_dy.splits * N * ER, self.kind == "channel"
            total = self.biases and not self.routed and (self.trained or channel)
            cross = channel and self.skip == "gated"
            backward += e * (T * N + T * ER + cross * T * D) + 2 * parts
            backward += e * (self.gate if self.kind == "element" or self.shared else 0)
            backward += 2 * 4 * tiles.outer_dy.splits * N * (total or cross) * (1 + cross)
            backward += e * (N * ER * (self.trained + channel) + 2 * channel * N + total * N * (1 + self.trained))
        return {"forward": forward, "backward": backward + self.routes()}

    def of_rows(self) -> int:
        """The gradient of a gate of rows from their dots."""
        G = self.gate
        return 4 * self.T + 4 * G + self.sigmoid * (self.cast(G) + 40 * G) + self.cast(G)

    def sums(self, size: int) -> int:
        """dpre's column sums."""
        if not (self.biases or self.centre):
            return 0
        several = 4 * (self.ER + self.R) * (self.E > 1)
        return self.e * size + 4 * self.ER + several + self.cast(self.R) + 4 * self.R * self.centre

    def routes(self) -> int:
        """What is particular to a route: its gradient, and the sums over each sample that the experts' biases see."""
        if not self.routed:
            return 0
        T, B, E, N, e = self.T, self.B, self.E, self.N, self.e
        found = 4 * T * E + 4 * T * E + 4 * B * E + self.cast(B * E)
        if self.biases:
            found += e * T * N + e * (self.gate if self.shared else 0) + 4 * B * N
            found += self.cast(B * E) + self.cast(E * N) + 8 * B * N
            found += self.trained * (4 * (B * E + B * N + 2 * B * E * N + E * N) + self.cast(E * N))
            found += 4 * (B * N + E * N + 2 * B * E * N + B * E) + 12 * B * E
        return found

    def products(self) -> dict[str, int]:
        """Cases of a large rank have no route."""
        T, D, N, R, e = self.T, self.D, self.N, self.R, self.e
        normed = (e * (2 * T * D + (self.norm + self.centre) * D) + 8 * T) * self.norm
        first, second = e * (T * D + D * R + T * R), e * (T * R + R * N + T * N)
        mid = e * (2 * T * R + self.biases * R) + self.seed
        added = e * (self.gate + self.bias_n) + e * T * D * (self.skip != "none")
        forward = normed + first + mid + second + e * (2 * T * N + self.adds * T * N) + added
        backward = normed + first + second + mid + 2 * e * T * R + e * (self.gate if self.shared else 0)
        gated = self.skip == "gated"
        if self.kind == "element":
            # b again, then dy, b, gate -> G dy, dgate
            backward += mid + second + e * (5 * T * N + self.bias_n + gated * T * D)
        elif gated or self.shared:
            backward += e * (T * N + self.gate + (self.shared and self.biases) * N) + gated * e * 2 * T * D
        if self.shared:
            dots = self.biases or gated
            backward += 4 * T + dots * (4 * T + 12 * T) + self.of_rows()
        backward += second  # dyᵀ z
        if self.biases:
            opened = self.kind == "element" or self.shared
            backward += e * (T * N + (self.gate if opened else 0)) + 2 * 4 * max(1, T // 1024) * N + e * 2 * N
            backward += e * T * R + 4 * R + self.cast(R)
        backward += 2 * e * N * R  # dup, from one partial sum
        backward += first + first  # ddown, dn
        if self.norm:
            backward += e * (3 * T * D + gated * T * D + (self.skip == "add") * T * D + D) + 8 * T
        elif self.skip != "none":
            backward += e * T * D if self.skip == "add" else 0
        return {"forward": forward, "backward": backward}
