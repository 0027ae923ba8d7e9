"""Shapes of modality_linear, for tests and benchmarks alike."""

from __future__ import annotations

from ...testing.case import Case, Make


def _case(name, T, K, N, tags=(), recipe="", **options) -> Case:
    """runs: expert and share of the rows of each run, one after the other, -1 for padding; experts: how many;
    biases: of which experts; gated: x is act(gate) * x; trained: which experts' weights and biases get gradients;
    frozen_x."""
    given = {"runs": ((0, 0.3), (1, 0.5), (0, 0.2)), "experts": 2, "biases": (), "trained": (0, 1), **options}
    return Case(name, {"T": T, "K": K, "N": N}, given, frozenset(tags), recipe)


PRECISIONS = ("fp32", "bf16", "fp16", "amp-bf16")

# 1 begin, 1225 patches and 1 end of an image in 1482 tokens: the end of the image is a language token
_COGVLM = ((0, 1 / 1482), (1, 1226 / 1482), (0, 255 / 1482))

CASES = (
    # every term at once: both biases, padding, more rows than a tile
    _case("everything", 150, 43, 72, biases=(0, 1), runs=((0, 0.3), (1, 0.4), (0, 0.2), (-1, 0.1)),
          tags=("all-precisions", "sharp")),
    _case("row by row", 37, 24, 40, runs=((0, 0.028), (1, 0.028)) * 18, biases=(1,), tags=("all-precisions",)),
    _case("four experts", 66, 20, 24, experts=4, trained=(0, 1, 2, 3), biases=(0, 3),
          runs=((2, 0.2), (0, 0.3), (3, 0.1), (1, 0.4))),
    _case("one modality", 33, 24, 40, runs=((0, 1.0),)),
    _case("frozen language", 70, 24, 40, trained=(1,), biases=(1,)),
    _case("frozen x", 33, 24, 40, frozen_x=True, biases=(0,)),
    _case("gated", 70, 43, 24, gated=True, biases=(1,), tags=("all-precisions", "sharp")),
    _case("gated gelu", 33, 24, 40, gated=True, act="gelu_tanh", trained=(1,)),
    _case("gated, all frozen", 20, 24, 40, gated=True, trained=()),
    _case("bias alone", 33, 24, 40, trained=(), biases=(1,), train_bias=True),
    _case("long row", 20, 300, 40),
    _case("many columns", 20, 24, 300),
    *(
        _case(name, T, K, N, ("bench", *tags), recipe, runs=_COGVLM, trained=(1,), biases=biases)
        for name, T, K, N, biases, tags, recipe in (
            ("cogvlm qkv B4", 5928, 4096, 12288, (), ("uncounted",), "CogVLM-17B, 4 x (1225 of an image, 257 of text)"),
            ("cogvlm gate B4", 5928, 4096, 11008, (), ("uncounted",), "CogVLM-17B's feed-forward, 4 images"),
            ("cogvlm2 qkv B4", 5928, 4096, 6144, (1,), ("uncounted",), "CogVLM2-8B, 8 groups, a bias for the images"),
            ("cogvlm2 k B4", 5928, 4096, 1024, (1,), (), "CogVLM2-8B's keys by themselves, 8 groups of 128"),
        )
    ),
    _case("cogvlm down B4", 5928, 11008, 4096, ("bench", "uncounted"), "CogVLM-17B's feed-forward with its gate",
          runs=_COGVLM, trained=(1,), gated=True),
    _case("mplug-owl2 k B16", 6144, 4096, 4096, ("bench", "uncounted"), "mPLUG-Owl2, 16 x (64 of image, 320 of text)",
          runs=((0, 0.1), (1, 1 / 6), (0, 1 - 0.1 - 1 / 6))),
)  # fmt: skip


def pattern(case: Case) -> list[int]:
    """The expert of each row."""
    T = case["T"]
    rows: list[int] = []
    for i, (expert, share) in enumerate(case.get("runs")):
        last = i == len(case.get("runs")) - 1
        rows += [expert] * (T - len(rows) if last else max(1, round(share * T)))
    return rows[:T]


def inputs(case: Case, make: Make) -> dict:
    """Arguments of modality_linear; every additive term is at least 30 % of the output's scale."""
    T, K, N = (case[d] for d in "TKN")
    trained = case.get("trained")
    kw = {
        "x": make.normal(T, K, grad=not case.get("frozen_x")),
        "index": make.numbers(pattern(case)),
        "gate": make.normal(T, K, grad=not case.get("frozen_x")) if case.get("gated") else None,
        "act": case.get("act", "silu"),
    }
    for e in range(4):
        has, bias = e < case.get("experts"), e in case.get("biases")
        kw[f"w{e}"] = make.normal(N, K, std=K**-0.5, grad=e in trained, wide=False) if has else None
        kw[f"b{e}"] = make.normal(N, grad=e in trained or bool(case.get("train_bias"))) if bias else None
    return kw


def fewer_rows(kw: dict, rows: int) -> dict:
    """The same arguments on the first rows of x."""
    given = {n: kw[n] for n in ("x", "gate") if kw[n] is not None}
    cut = {n: t.detach()[:rows].contiguous().requires_grad_(t.requires_grad) for n, t in given.items()}
    return kw | cut | {"index": kw["index"][:rows].clone()}


def _scaled(name: str, factor: float):
    return lambda kw: kw | {name: kw[name].detach() * factor} if kw[name] is not None else None


def _first_of_the_second(kw: dict) -> dict:
    """The first row of expert 1 goes to expert 0."""
    index = kw["index"].clone()
    index[int((index == 1).int().argmax())] = 0
    return kw | {"index": index}


# How to leave a term out, or halve it, in the arguments: the engine must see each change fail.
TERMS = {
    "b0 halved": _scaled("b0", 0.5),
    "b1 dropped": _scaled("b1", 0.0),
    "w1 halved": _scaled("w1", 0.5),
    "experts exchanged": lambda kw: kw | {"w0": kw["w1"], "w1": kw["w0"]},
    "one row of another": _first_of_the_second,
    "padding computed": lambda kw: kw | {"index": kw["index"].clamp(min=0)} if (kw["index"] < 0).any() else None,
    "no gate": lambda kw: kw | {"gate": None} if kw["gate"] is not None else None,
    "another activation": lambda kw: kw | {"act": "gelu"} if kw["gate"] is not None else None,
}


def _rows_of(case: Case) -> list[int]:
    """Rows of each expert."""
    rows = pattern(case)
    return [rows.count(e) for e in range(case.get("experts"))]


def flops(case: Case) -> dict[str, int]:
    """Multiply-adds times two of the matrix products: of rows that have an expert."""
    each = [2 * rows * case["K"] * case["N"] for rows in _rows_of(case)]
    return {
        "forward": sum(each),
        "backward": sum(each) * (not case.get("frozen_x")) + sum(each[e] for e in case.get("trained")),
    }


def floor_bytes(case: Case, itemsize: int) -> dict[str, int]:
    """Each argument and what is saved read once, each result written once; weights of experts that have rows."""
    T, K, N, e = case["T"], case["K"], case["N"], itemsize
    live = [n for n, rows in enumerate(_rows_of(case)) if rows]
    need_x = not case.get("frozen_x")
    weights = e * N * K
    trained = [n for n in case.get("trained") if n in live]
    inputs = 2 if case.get("gated") else 1
    return {
        "forward": e * (inputs * T * K + T * N) + weights * len(live),
        "backward": e * T * N + need_x * (inputs * e * T * K + weights * len(live))
        + (bool(trained) or inputs == 2) * inputs * e * T * K + weights * len(trained),
    }  # fmt: skip


def _product_bytes(case: Case, e: int) -> int:
    """One pass of the product's kernel: the index, rows that have an expert, the weights of experts that have rows."""
    T, K, N, counts = case["T"], case["K"], case["N"], _rows_of(case)
    return 4 * T + e * (sum(counts) * K + T * N + sum(n > 0 for n in counts) * K * N)


def bytes_moved(case: Case, itemsize: int) -> dict[str, int]:
    """Bytes that the Triton plan moves; one dtype throughout. A test holds this to the count."""
    T, K, N, e = case["T"], case["K"], case["N"], itemsize
    counts, need_x = _rows_of(case), not case.get("frozen_x")
    forward = _product_bytes(case, e) + e * N * sum(counts[n] > 0 for n in case.get("biases"))
    backward, gated, again = 0, bool(case.get("gated")), bool(case.get("trained"))
    if gated:
        forward += 3 * e * T * K
        # x, gate, and h again; dh twice and dgate
        backward += (2 + again + 3 * need_x) * e * T * K if again or need_x else 0
    if need_x:
        # the same product with rows of dy, and dx in place of y
        backward += _product_bytes(case, e) + e * (sum(counts) - T) * (N - K)
    for expert, rows in enumerate(counts):
        product = expert in case.get("trained")
        sums = expert in case.get("biases") and (product or bool(case.get("train_bias")))
        if product or sums:
            backward += 4 * T + e * rows * N
        if product:
            backward += e * rows * K + e * N * K
        if sums:
            backward += 4 * N + (0 if e == 4 else (4 + e) * N)
    return {"forward": forward, "backward": backward}
