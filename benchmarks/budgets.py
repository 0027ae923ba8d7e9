"""What each op may cost: declared here, held by tests/test_benchmarks.py and by `python -m benchmarks.memory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vlkernels.ops.mlp_projector import cases as mlp_projector_cases
from vlkernels.testing.case import Case, Precision

LEVEL_0 = 1.02  # of the baseline's FLOPs, where no matrix product is computed twice


@dataclass(frozen=True)
class Budget:
    """Limits of one op.

    saved_per_token(case, precision), saved_per_call: bytes kept for backward beyond the op's input and parameters.
    flops_ratio(case): forward + backward FLOPs over the baseline's, where dims fill their tiles. LEVEL_0 where no
        product is computed twice; an op with recomputation says here what it costs.
    small: dims of the case on which the test counts; the bytes and FLOPs per token are linear in the rows.
    """

    saved_per_token: Callable[[Case, Precision], int]
    saved_per_call: int
    flops_ratio: Callable[[Case], float]
    small: Mapping[str, int]

    def saved(self, case: Case, precision: Precision) -> int:
        """Bytes a call on the case's rows may save."""
        return self.saved_per_token(case, precision) * case["T"] + self.saved_per_call


def _low_rank_bytes(case: Case, precision: Precision) -> int:
    """s (T, R) in the dtype of the low-rank branch: 2r bytes a token in 16 bits, 4r in float32."""
    low = precision.autocast or precision.adapter
    return case["R"] * torch.empty((), dtype=low).element_size()


def _projector_bytes(case: Case, precision: Precision) -> int:
    """The first product at level 0, and with a norm 8 bytes of statistics a row."""
    gate = case.get("gated") or case.get("own_gate")
    inner = case["F"] * (2 if gate else 1) * (case.get("level", 0) == 0)
    stats = 8 * case.get("merge", 1) if case.get("norm", "none") != "none" else 0
    return inner * torch.empty((), dtype=precision.compute).element_size() + stats


def _projector_flops(case: Case) -> float:
    """Level 1 computes the first product once more."""
    if case.get("level", 0) == 0:
        return LEVEL_0
    plain = case.derived(level=0)
    ours, eager = (sum(mlp_projector_cases.flops(c).values()) for c in (case, plain))
    return LEVEL_0 * ours / eager


BUDGETS: dict[str, Budget] = {
    "linear_projector": Budget(
        saved_per_token=lambda case, precision: 8 * (case.get("norm", "none") != "none"),  # the norm's statistics
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 32, "N": 64},
    ),
    "lora_linear": Budget(
        saved_per_token=_low_rank_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "K": 128, "N": 256, "R": 16},
    ),
    "mlp_projector": Budget(
        saved_per_token=_projector_bytes,
        saved_per_call=0,
        flops_ratio=_projector_flops,
        small={"T": 128, "C": 32, "F": 64, "N": 64},
    ),
}
