"""Shapes of deformable_attention, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make


def _case(name, B, M, H, K, P, shapes, tags=(), recipe="", **options) -> Case:
    """T = B M queries in all; shapes (h, w) of each level. Options: reference, (batch, levels) of its rows, None for
    ready locations; softmax."""
    options = {"shapes": shapes, "reference": (B, 1), "softmax": True, **options}
    return Case(name, {"T": B * M, "M": M, "H": H, "K": K, "P": P}, options, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # several rectangular maps, one row of reference points for all images
    _case("everything", 2, 33, 1, 12, 2, ((5, 7), (3, 4)), reference=(1, 1), tags=("all-precisions", "sharp")),
    # as Deformable DETR's bare operator: locations and weights are ready
    _case("locations", 2, 24, 1, 6, 2, ((4, 4), (2, 3)), reference=None, softmax=False),
    _case("one map", 1, 36, 1, 40, 4, ((4, 4),), frozen_reference=True),
    _case("levels' own references", 2, 13, 2, 8, 2, ((3, 2), (1, 1), (2, 5)), reference=(2, 3)),
    _case("frozen value", 1, 17, 2, 72, 2, ((3, 3),), frozen=True),
    _case("honeybee 224 B64", 64, 144, 8, 128, 4, ((16, 16),), reference=(1, 1), tags=("bench",),
          recipe="Honeybee's D-Abstractor on 256 tokens"),
    _case("honeybee 336 B64", 64, 144, 8, 128, 4, ((24, 24),), reference=(1, 1), tags=("bench",),
          recipe="Honeybee's D-Abstractor on 576 tokens"),
    _case("honeybee 336 B4", 4, 144, 8, 128, 4, ((24, 24),), reference=(1, 1), tags=("bench", "uncounted"),
          recipe="Honeybee's D-Abstractor on 576 tokens"),
    _case("deformable detr B2", 2, 300, 8, 32, 4, ((100, 134), (50, 67), (25, 34), (13, 17)), reference=(2, 4),
          tags=("bench", "uncounted"), recipe="Deformable DETR's decoder"),
)  # fmt: skip


def _batch(case: Case) -> tuple[int, int]:
    """B, and M: of fewer queries than one image has, one image with these."""
    M = min(case["M"], max(case["T"], 1))
    return -(-case["T"] // M), M


def _positions(case: Case) -> int:
    return sum(h * w for h, w in case.get("shapes"))


def inputs(case: Case, make: Make) -> dict:
    """Arguments of deformable_attention; offsets of some positions, so that some samples fall outside of the map."""
    (B, M), H, K, P, shapes = _batch(case), case["H"], case["K"], case["P"], case.get("shapes")
    L, rows = len(shapes), case.get("reference")
    kw: dict = {"value": make.normal(B, _positions(case), H, K, grad=not case.get("frozen"))}
    logits = make.normal(B, M, H, L, P, grad=True)
    kw["weights"] = logits
    if rows is None:
        # in [-0.25, 1.25] mostly
        kw["points"] = (0.5 + make.normal(B, M, H, L, P, 2, std=0.4)).requires_grad_()
    else:
        kw["points"] = make.normal(B, M, H, L, P, 2, std=1.5, grad=True)
        centres = 0.5 + make.normal(min(rows[0], B), M, rows[1], 2, std=0.3)
        kw["reference"] = centres.requires_grad_(not case.get("frozen_reference"))
    return kw | {"shapes": [size for shape in shapes for size in shape], "softmax": case.get("softmax")}


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments with the first `rows` queries of each image."""
    names = [n for n in ("points", "weights", "reference") if kw.get(n) is not None]

    def cut(t: torch.Tensor) -> torch.Tensor:
        # strides of a tensor of its own, also along axes of length 1
        return t.detach()[:, :rows].clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)

    return kw | {n: cut(kw[n]) for n in names}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw.get(name) is not None else None


def _moved(axis: int):
    """Half a position further along one axis."""

    def change(kw: dict) -> dict:
        points = kw["points"].detach().clone()
        points[..., axis] += 0.5
        return kw | {"points": points}

    return change


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "value halved": _scaled("value", 0.5),
    "offsets halved": _scaled("points", 0.5),
    "logits halved": _scaled("weights", 0.5),
    "reference dropped": _scaled("reference", 0.0),
    "x moved": _moved(0),
    "y moved": _moved(1),
    "no softmax": lambda kw: kw | {"softmax": False},
    "offsets as locations": lambda kw: kw | {"reference": None},
    "levels swapped": lambda kw: kw | {"shapes": kw["shapes"][2:] + kw["shapes"][:2]},
}


def flops(case: Case) -> dict[str, int]:
    """Of the matrix products: the gradient of value alone is one, over all queries of a map."""
    (B, M), S = _batch(case), _positions(case)
    return {"forward": 0, "backward": 2 * B * case["H"] * M * S * case["K"] * (not case.get("frozen"))}


def _sizes(case: Case, e: int) -> dict[str, int]:
    (B, M), H, K, P, L = _batch(case), case["H"], case["K"], case["P"], len(case.get("shapes"))
    rows = case.get("reference")
    return {
        "value": e * B * _positions(case) * H * K,
        "points": 2 * e * B * M * H * L * P,
        "weights": e * B * M * H * L * P,
        "reference": 0 if rows is None else 2 * e * min(rows[0], B) * M * rows[1],
        "y": e * B * M * H * K,
        "stats": 8 * B * M * H * bool(case.get("softmax")),
    }


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    s = _sizes(case, itemsize)
    arguments = s["value"] + s["points"] + s["weights"] + s["reference"]
    grads = arguments - s["value"] * bool(case.get("frozen")) - s["reference"] * bool(case.get("frozen_reference"))
    return {"forward": arguments + s["y"] + s["stats"], "backward": arguments + s["y"] + s["stats"] + grads}


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves where every position is sampled; a test holds this to the count."""
    s, shapes = _sizes(case, itemsize), case.get("shapes")
    (B, M), rows, L = _batch(case), case.get("reference"), len(shapes)
    forward = floor_bytes(case, itemsize)["forward"]
    backward = s["value"] + 2 * (s["points"] + s["weights"]) + s["stats"] + s["reference"] + s["y"]
    if not case.get("frozen"):
        # a launch a level: each reads its level's points and logits, all of dy and of the statistics
        level = s["reference"] / L if rows and rows[1] > 1 else s["reference"]
        backward += s["value"] + L * (s["y"] + s["stats"] + level) + s["points"] + s["weights"]
    if rows is not None and not case.get("frozen_reference"):
        parts = 8 * B * M * case["H"] * rows[1]
        summed = 8 * min(rows[0], B) * M * rows[1]
        backward += 2 * parts + summed + (summed + s["reference"]) * (itemsize != 4)
    return {"forward": forward, "backward": round(backward)}
