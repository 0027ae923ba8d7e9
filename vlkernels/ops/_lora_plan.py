"""Which plan lora_linear's kernels follow; every plan computes the same numbers to within the rule.

    update       cuBLAS's product, then y += scale s Bᵀ in place; backward dy W, then dx += mask (ds A). The default.
    two_source   the low-rank term and the large product on one accumulator, in Triton (`_lora_two_source`): no pass
                 over y or dx apart. Not chosen by itself: no GPU has timed it yet.
    packed       weight and b are columns of one buffer [W, B] (`_lora_packed`, modules.PackedLoRALinear): cuBLAS
                 multiplies [x, scale s] with it. Whoever packs them chooses it; other weights take "update" under it.

A call with `base` or with 4-bit codes for a weight always takes "update".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

PLANS = ("update", "two_source", "packed")
DEFAULT = "update"


def known(name: str | None, where: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in PLANS:
        raise ValueError(f"{where} is {name!r}; accepted: auto, {', '.join(PLANS)}")
    return name


_forced: str | None = known(os.environ.get("VLKERNELS_LORA_PLAN"), "VLKERNELS_LORA_PLAN")


@contextlib.contextmanager
def use_plan(name: str | None) -> Iterator[None]:
    """Every kernel call of lora_linear in the block, forward and backward, follows this plan; None or "auto" lifts it.

    VLKERNELS_LORA_PLAN does the same for a whole process. What a forward saves fits every plan, so a backward outside
    the block takes the plan that holds there. The setting is the process's, as that of `use_backend` is.
    """
    global _forced
    previous, _forced = _forced, known(name, "use_plan(name)")
    try:
        yield
    finally:
        _forced = previous


def choose(configured: str, is_packed: bool) -> str:
    """The plan of a call: the forced one, else "packed" for packed weights, else what the configuration says."""
    if _forced is not None:
        return DEFAULT if _forced == "packed" and not is_packed else _forced
    return "packed" if is_packed else configured
