"""Predicted times: counted FLOPs and bytes over assumed rates. They are there to be refuted by a measurement."""

from __future__ import annotations

# rates assumed for an H200 until it is measured: TFLOP/s of a bf16 product, TB/s of a copy, and the shares of the two
# that a cuBLAS product and a streaming kernel reach
TFLOPS, TBS = 790.0, 4.3
PRODUCT, STREAM = 0.93, 0.90
CEILINGS = {"bf16_tflops": TFLOPS, "copy_tbs": TBS}


def predict(entry: dict, side: str, direction: str, big_product: tuple[int, int]) -> float:
    """Milliseconds forward or backward: the big product at its rate, every other counted byte at the streaming rate.

    entry: of the memory record; side: "ours" or "baseline"; big_product: (FLOPs, bytes).
    """
    flops, bytes_in_product = big_product
    per_token, per_call = entry[side]["moved"][direction]
    others = per_token * entry["dims"]["T"] + per_call - bytes_in_product
    return flops / (PRODUCT * TFLOPS) * 1e-9 + others / (STREAM * TBS) * 1e-9
