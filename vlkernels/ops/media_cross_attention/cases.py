"""Shapes of media_cross_attention, for tests and benchmarks alike."""

from __future__ import annotations

import torch

from ...testing.case import Case, Make
from .._attention import NORM_ROWS
from .._device import arch
from .spans import spans_of_time, spans_of_visible, text_time
from .triton import config


def _case(name, B, M, J, n, H, K, G=0, tags=(), recipe="", **options) -> Case:
    """T = B M tokens in all, J media of n keys. Options: mask ("immediate", "previous", "visible", "additive", "none"),
    late: more media in the text than there are; norm, p."""
    return Case(
        name, {"T": B * M, "M": M, "J": J, "n": n, "H": H, "K": K, "G": G or H}, options, frozenset(tags), recipe
    )


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

CASES = (
    # tiles of keys that no token of a tile sees; tokens before the first medium and, where late, past the last one
    _case("immediate", 2, 33, 3, 9, 1, 12, late=True, p=0.1, tags=("all-precisions", "sharp")),
    _case("visible", 2, 12, 4, 11, 2, 12, G=1, mask="visible", norm="rms", tags=("all-precisions", "sharp")),
    _case("previous", 2, 37, 5, 16, 1, 10, mask="previous"),
    _case("additive", 1, 18, 3, 15, 2, 8, mask="additive"),
    _case("unmasked", 1, 17, 1, 35, 1, 96, mask="none"),
    *(
        _case(name, B, M, J, n, H, K, G, tags=("bench", *(("uncounted",) if slow else ())), recipe=recipe, **options)
        for name, B, M, J, n, H, K, G, recipe, options, slow in (
            ("openflamingo-9b B8", 8, 256, 5, 64, 8, 64, 8, "OpenFlamingo-9B, 5 images a sample", {}, False),
            ("openflamingo-9b B8 previous", 8, 256, 5, 64, 8, 64, 8, "all media so far", {"mask": "previous"}, False),
            ("idefics-9b B4", 4, 512, 4, 64, 32, 128, 32, "IDEFICS-9B, 4 images a sample",
             {"mask": "visible", "norm": "rms"}, True),
            ("idefics-9b B4 additive", 4, 512, 256, 1, 32, 128, 32, "the same, swapped", {"mask": "additive"}, True),
            ("idefics p0.1", 4, 512, 4, 64, 16, 64, 16, "smaller heads, with dropout",
             {"mask": "visible", "p": 0.1}, True),
            ("mllama-11b B1", 1, 512, 4, 1601, 32, 128, 8, "Mllama, one image of 4 tiles",
             {"mask": "visible", "norm": "rms"}, True),
        )
    ),
)  # fmt: skip


def _batch(case: Case) -> tuple[int, int]:
    """B, and M: of fewer tokens than one sample has, one sample with these."""
    M = min(case["M"], max(case["T"], 1))
    return -(-case["T"] // M), M


def inputs(case: Case, make: Make) -> dict:
    """Arguments of media_cross_attention."""
    (B, M), J, n, H, K, G = _batch(case), *(case[d] for d in ("J", "n", "H", "K", "G"))
    mask, norm = case.get("mask", "immediate"), case.get("norm", "none")
    kw: dict = {"q": make.normal(B, M, H, K, grad=True)}
    kw["k"], kw["v"] = (make.normal(B, J * n, G, K, grad=True) for _ in "kv")
    span = visible = None
    if mask in ("immediate", "previous"):
        # media at even distances; the first tokens come before all of them
        at = torch.arange(M, device=kw["q"].device)
        every = max(1, M // (J + 1 + 2 * bool(case.get("late"))))
        locations = ((at % every == every - 1) & ((at // every < J) | bool(case.get("late")))).expand(B, M)
        span = spans_of_time(text_time(locations), J, mask == "immediate")
    elif mask in ("visible", "additive"):
        visible = make.rows(B * M * J, 3).view(B, M, J) > 0
        visible[:, : M // 2, J // 2 :] = False
        visible[0, 0] = False
        if mask == "visible":
            visible, span = spans_of_visible(visible)
            span[:, 1] = 0  # one whose attention is zero
        else:
            zero = torch.zeros(visible.shape, dtype=kw["q"].dtype, device=visible.device)
            visible = zero.masked_fill(~visible, torch.finfo(zero.dtype).min)
    kw |= {"span": span, "visible": visible}
    if norm != "none":
        # moderate scores: a sharp softmax makes the largest error of a draw a matter of luck
        kw |= {side + "_norm_weight": make.normal(K, std=0.6, grad=True) for side in "qk"}
    return kw | {
        "seed": make.seed() if case.get("p") else None,
        "tokens": n,
        "norm": norm,
        "p": case.get("p", 0.0),
    }


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments with the first `rows` tokens of each sample."""
    cut = {"q": kw["q"].detach()[:, :rows].contiguous().requires_grad_(kw["q"].requires_grad)}
    for name in ("span", "visible"):
        if kw[name] is not None:
            cut[name] = kw[name][:, :rows].contiguous()
    return kw | cut


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw.get(name) is not None else None


def _moved(kw: dict) -> dict | None:
    """Tokens of zero attention get the mean, and those of the mean zero."""
    if kw["span"] is None:
        return None
    begin, end = kw["span"].unbind(-1)
    other = torch.where(begin == end, 1, torch.where(begin > end, 0, begin))
    return kw | {"span": torch.stack((other.to(torch.int32), torch.where(begin < end, end, 0)), -1)}


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "span dropped": lambda kw: kw | {"span": None} if kw["span"] is not None and kw["visible"] is None else None,
    "empty rows exchanged": _moved,
    "one medium later": lambda kw: (
        kw | {"span": kw["span"] + 1} if kw["span"] is not None and kw["visible"] is None else None
    ),
    "visibility dropped": lambda kw: kw | {"visible": None} if kw["visible"] is not None else None,
    "k_norm_weight halved": _scaled("k_norm_weight", 0.5),
    "another dropout": lambda kw: kw | {"seed": kw["seed"] + 1} if kw["p"] else None,
}


def _visited(case: Case, kw: dict, block_m: int, block_n: int) -> tuple[int, int]:
    """Of all samples: keys that some tile of tokens reads, and tokens in tiles that read any."""
    (B, M), J, n = _batch(case), case["J"], case["n"]
    if kw["span"] is None:
        return B * J * n, B * M
    blocks = -(-M // block_m)
    span = torch.nn.functional.pad(kw["span"], (0, 0, 0, blocks * block_m - M)).view(B, blocks, block_m, 2)
    begin, end = span.unbind(-1)
    some, mean = begin < end, begin > end
    low = torch.where(some, begin, torch.where(mean, 0, J)).amin(-1, keepdim=True)
    high = torch.where(some, end, torch.where(mean, J, 0)).amax(-1, keepdim=True)
    key = torch.arange(J * n)
    read = (key >= low * n // block_n * block_n) & (key < (high * n + block_n - 1) // block_n * block_n) & (low < high)
    rows = torch.full((blocks,), block_m)
    rows[-1] = M - (blocks - 1) * block_m
    return int(read.any(1).sum()), int(((low < high)[..., 0] * rows).sum())


class _Shapes(Make):
    """Inputs of which only the masks matter."""

    def __init__(self):
        from ...testing.case import PRECISIONS as ALL

        super().__init__(ALL["bf16"])


def _tiles(case: Case, itemsize: int):
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    return config(_batch(case)[1], case["K"], dtype, arch(torch.empty(0)), dtype, bool(case.get("p")))


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products, without skipping; the backward computes the scores twice."""
    (B, M), N, H, K = _batch(case), case["J"] * case["n"], case["H"], case["K"]
    product = 2 * B * H * M * N * K
    return {"forward": 2 * product, "backward": 7 * product}


def padding(case: Case) -> float:
    """What the products compute over what is asked for: tiles of tokens, keys and head dims."""
    M, tiles, N, K = _batch(case)[1], _tiles(case, 2), case["J"] * case["n"], case["K"]
    filled = lambda count, block: -(-count // block) * block / count  # noqa: E731
    return filled(M, tiles.m) * filled(N, tiles.n) * filled(K, max(16, 2 ** (K - 1).bit_length()))


def _sizes(case: Case, e: int) -> dict[str, int]:
    """Bytes of the arguments and of y."""
    (B, M), J, n, H, K, G = _batch(case), *(case[d] for d in ("J", "n", "H", "K", "G"))
    mask = case.get("mask", "immediate")
    seen = B * M * J * {"visible": 1, "additive": e}.get(mask, 0)
    span = 8 * B * M * (mask in ("immediate", "previous", "visible"))
    return {"q": e * B * M * H * K, "kv": 2 * e * B * J * n * G * K, "seen": seen, "span": span,
            "y": e * B * M * H * K, "stats": 8 * B * H * M}  # fmt: skip


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once."""
    s = _sizes(case, itemsize)
    masks = s["seen"] + s["span"]
    return {
        "forward": s["q"] + s["kv"] + masks + s["y"] + s["stats"],
        "backward": 2 * (s["q"] + s["kv"]) + masks + 2 * s["y"] + s["stats"],
    }


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    e, s, tiles, kw = itemsize, _sizes(case, itemsize), _tiles(case, itemsize), inputs(case, _Shapes())
    (B, M), J, n, H, K, G = _batch(case), *(case[d] for d in ("J", "n", "H", "K", "G"))
    seed, normed, norm_grads = 8 * bool(case.get("p")), 0, 0
    if case.get("norm", "none") != "none":
        for heads in (B * M * H, B * J * n * G):
            blocks = -(-heads // NORM_ROWS)
            normed += heads * (2 * e * K + 8) + e * K
            norm_grads += heads * (3 * e * K + 8) + e * K + 16 * K * min(blocks, 264) + 8 * K
        norm_grads += 2 * (4 + e) * K * (e != 4)
    masks = s["seen"] + s["span"] + seed
    keys, _ = _visited(case, kw, tiles.m, tiles.n)
    forward = normed + s["q"] + s["kv"] * keys // (B * J * n) + masks + s["y"] + s["stats"]
    keys, tokens = _visited(case, kw, tiles.back_m, tiles.back_n)
    state = s["q"] + 2 * s["y"] + s["stats"]
    backward = normed + norm_grads + state + s["kv"] * keys // (B * J * n) + masks + s["q"]
    backward += state * tokens // (B * M) + 2 * s["kv"] + masks
    return {"forward": forward, "backward": backward}
