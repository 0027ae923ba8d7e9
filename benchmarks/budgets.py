"""What each op may cost: declared here, held by tests/test_benchmarks.py and by `python -m benchmarks.memory`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vlkernels.ops.bottleneck_adapter import cases as bottleneck_adapter_cases
from vlkernels.ops.bottleneck_adapter.triton import MAX_RANK
from vlkernels.ops.conv_se_linear import cases as conv_se_linear_cases
from vlkernels.ops.cross_attention import cases as cross_attention_cases
from vlkernels.ops.dora_linear import cases as dora_linear_cases
from vlkernels.ops.media_cross_attention import cases as media_cross_attention_cases
from vlkernels.ops.mlp_projector import cases as mlp_projector_cases
from vlkernels.ops.pooled_mlp import cases as pooled_mlp_cases
from vlkernels.ops.prefix_attention import cases as prefix_attention_cases
from vlkernels.ops.selective_scan_2d.reference import chunk_length
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


def _low_rank_flops(case: Case) -> float:
    """A decoding batch fills part of the rank products' row tile of 64: at 16 rows they compute up to four times."""
    return LEVEL_0 if case["T"] >= 64 else 1.2


def _adapter_flops(case: Case) -> float:
    """Nothing R wide is kept: the first product is run again, with a gate of each element the second too. Experts of a
    route are columns of one z, each with the first product of its own: their ranks are small and fill one tile. One
    kernel holds a power of two of columns, of which 96 fill three quarters: at these ranks bytes take the time."""
    products, experts = bottleneck_adapter_cases.flops(case), max(1, case.dims.get("E", 0))
    single, columns = 2 * case["T"] * case["D"] * case["R"], case["R"] * experts
    held = max(16, 2 ** math.ceil(math.log2(columns)))
    padding = held / columns if held <= MAX_RANK[torch.bfloat16] else 1.0
    return LEVEL_0 * padding * sum(products.values()) / (3 * (products["forward"] - (experts - 1) * single))


def _dora_bytes(case: Case, precision: Precision) -> int:
    """s (T, R), and at level 0 u (T, N) in the dtype of the product with W."""
    u = case["N"] * torch.empty((), dtype=precision.compute).element_size()
    return _low_rank_bytes(case, precision) + (u if case.get("level", 0) == 0 else 0)


def _dora_flops(case: Case) -> float:
    """Level 1 computes u once more."""
    ours, level_0 = (sum(dora_linear_cases.flops(c).values()) for c in (case, case.derived(level=0)))
    return LEVEL_0 * ours / level_0


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


def _linear_projector_bytes(case: Case, precision: Precision) -> int:
    """With a norm 8 bytes of statistics a row; a shuffle alone keeps its tokens and not x. Nothing for the rest."""
    if case.get("norm", "none") != "none":
        return 8
    shuffle = case.get("shuffle", 1)
    return case["C"] * shuffle**2 * torch.empty((), dtype=precision.compute).element_size() * (shuffle > 1)


def _attention_bytes(case: Case, precision: Precision) -> int:
    """y, and the maximum and denominator of each head's softmax."""
    return case["H"] * (case["K"] * torch.empty((), dtype=precision.compute).element_size() + 8)


def _attention_flops(case: Case) -> float:
    """The scores are computed again in backward, where eager keeps them; what does not fill its tiles is padded."""
    products = cross_attention_cases.flops(case)
    eager = 3 * products["forward"]
    return LEVEL_0 * cross_attention_cases.padding(case) * sum(products.values()) / eager


def _prefix_flops(case: Case) -> float:
    """As _attention_flops."""
    products = prefix_attention_cases.flops(case)
    return LEVEL_0 * prefix_attention_cases.padding(case) * sum(products.values()) / (3 * products["forward"])


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _group_bytes(case: Case, precision: Precision) -> int:
    """s of every adapter, and with a norm 8 bytes of statistics a row."""
    low = sum(case.get("ranks")) * _itemsize(precision.autocast or precision.adapter)
    return low + 8 * bool(case.get("norm"))


def _mlp_bytes(case: Case, precision: Precision) -> int:
    """Besides, gate and up before the activation."""
    return _group_bytes(case, precision) + 2 * case["F"] * _itemsize(precision.compute)


def _media_flops(case: Case) -> float:
    """As _attention_flops; keys and values, and dq, are kernels of their own. Skipped tiles are not counted in."""
    products = media_cross_attention_cases.flops(case)
    eager = 3 * products["forward"]
    return LEVEL_0 * media_cross_attention_cases.padding(case) * sum(products.values()) / eager


def _gated_bytes(case: Case, precision: Precision) -> int:
    """Beside the branch, or what its product is made from: with a norm its input and 8 bytes of statistics."""
    return (_itemsize(precision.compute) * case["C"] + 8) * (case.get("norm", "none") != "none")


def _norm_bytes(case: Case, precision: Precision) -> int:
    """8 bytes of statistics a row where there is a norm."""
    return 8 * (case.get("norm", "none") != "none")


def _gate_bytes(case: Case, precision: Precision) -> int:
    """The gate where there is one: it is an argument beside x, kept and not made."""
    return case["K"] * _itemsize(precision.base) * bool(case.get("gated"))


def _one_tile(case: Case) -> float:
    """The 64 rows that are counted are one tile of rows, which runs the products of all experts that it has.

    At full size only the tiles do in which one modality ends and the next begins: runs * 128 / T of them.
    """
    return LEVEL_0 * len({expert for expert, _ in case.get("runs") if expert >= 0})


def _convolution_bytes(case: Case, precision: Precision) -> int:
    """The convolution's result at level 0, and 8 bytes of statistics; both a token that comes out."""
    norm, act = case.get("norm", "layer") != "none", case.get("act", "none") != "none"
    kept = (norm or act) and case.get("level", 0) == 0
    return (kept * case["C"] * _itemsize(precision.compute) + 8 * norm) // case.get("stride", 1) ** 2


def _conv_se_bytes(case: Case, precision: Precision) -> int:
    """The convolution's result and the product at level 0, 8 bytes of statistics a norm."""
    kept = (case["C"] + case["N"]) * (case.get("level", 0) == 0) * _itemsize(precision.compute)
    return (kept + 16) // case.get("stride", 1) ** 2 + 8 * bool(case.get("in_norm"))


def _conv_se_flops(case: Case) -> float:
    """Level 1 computes the product once more."""
    ours, level_0 = (sum(conv_se_linear_cases.flops(c).values()) for c in (case, case.derived(level=0)))
    return LEVEL_0 * ours / level_0


def _pooled_flops(case: Case) -> float:
    """Of the second product's rows every fourth is left; level 1 computes the first product once more."""
    fewer, all_rows = (pooled_mlp_cases.flops(c) for c in (case, dataclasses.replace(case, dims=_unpooled(case))))
    again = case.get("level", 0) * 2 * case["T"] * case["C"] * case["F"]
    eager = sum(all_rows.values()) - again
    return LEVEL_0 * sum(fewer.values()) / eager


def _unpooled(case: Case) -> dict[str, int]:
    return {**case.dims, "P": case["H"], "Q": case["W"]}


def _deformable_bytes(case: Case, precision: Precision) -> int:
    """The maximum and denominator of each head's softmax."""
    return 8 * case["H"] * bool(case.get("softmax"))


def _scan_bytes(case: Case, precision: Precision) -> int:
    """In float32 the states between chunks; nothing besides the arguments where there is one chunk."""
    L, K, S = case["H"] * case["W"], len(case.get("scan")), case["S"]
    return -(-4 * K * case["D"] * S * (-(-L // chunk_length(L)) - 1) // L)


BUDGETS: dict[str, Budget] = {
    "bottleneck_adapter": Budget(
        saved_per_token=lambda case, precision: 0,
        saved_per_call=8,  # dropout's seed
        flops_ratio=_adapter_flops,
        small={"T": 128, "L": 32, "D": 64, "N": 64, "R": 16},
    ),
    "conv_se_linear": Budget(
        saved_per_token=_conv_se_bytes,
        saved_per_call=4 * 4096,  # an image's means, for the widest case; the count runs on one image
        flops_ratio=_conv_se_flops,
        small={"T": 128, "C": 64, "S": 16, "N": 64},
    ),
    "cross_attention": Budget(
        saved_per_token=_attention_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=_attention_flops,
        small={"T": 128, "M": 64, "N": 64, "N2": 64, "H": 2, "G": 2, "K": 32},
    ),
    "depthwise_conv_norm_act": Budget(
        saved_per_token=_convolution_bytes,
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 64},
    ),
    "deformable_attention": Budget(
        saved_per_token=_deformable_bytes,
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,  # plain PyTorch samples and multiplies no matrices
        small={"T": 128, "M": 64, "H": 1, "K": 16},
    ),
    "dora_linear": Budget(
        saved_per_token=_dora_bytes,
        saved_per_call=8 + 4 * 14336,  # dropout's seed; the norm, for the widest layer of the cases and of Llama-3-8B
        flops_ratio=_dora_flops,
        small={"T": 128, "K": 128, "N": 256, "R": 16},
    ),
    "gated_residual": Budget(
        saved_per_token=_gated_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 64},
    ),
    "linear_projector": Budget(
        saved_per_token=_linear_projector_bytes,
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 32, "N": 64},
    ),
    "lora_linear": Budget(
        saved_per_token=_low_rank_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=_low_rank_flops,
        small={"T": 128, "K": 128, "N": 256, "R": 16},
    ),
    "lora_mlp": Budget(
        saved_per_token=_mlp_bytes,
        saved_per_call=24,  # three seeds
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "K": 64, "F": 128},
    ),
    "lora_qkv": Budget(
        saved_per_token=_group_bytes,
        saved_per_call=24,  # three seeds
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "K": 64, "N": 64},
    ),
    "media_cross_attention": Budget(
        saved_per_token=_attention_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=_media_flops,
        small={"T": 128, "M": 64, "J": 2, "n": 32, "H": 2, "G": 2, "K": 32},
    ),
    "mlp_projector": Budget(
        saved_per_token=_projector_bytes,
        saved_per_call=0,
        flops_ratio=_projector_flops,
        small={"T": 128, "C": 32, "F": 64, "N": 64},
    ),
    "modality_linear": Budget(
        saved_per_token=_gate_bytes,
        saved_per_call=0,
        flops_ratio=_one_tile,
        small={"T": 128, "K": 64, "N": 64},
    ),
    "multi_layer_kv": Budget(
        saved_per_token=_norm_bytes,
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 32, "L": 2, "W": 32},
    ),
    "norm_residual": Budget(
        saved_per_token=_norm_bytes,
        saved_per_call=8,  # dropout's seed
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "C": 64},
    ),
    "pooled_mlp": Budget(
        saved_per_token=lambda case, precision: case["F"] * _itemsize(precision.compute) * (case.get("level", 0) == 0),
        saved_per_call=0,
        flops_ratio=_pooled_flops,
        small={"T": 128, "C": 32, "F": 64, "N": 64},
    ),
    "selective_scan_2d": Budget(
        saved_per_token=_scan_bytes,
        saved_per_call=0,
        flops_ratio=lambda case: LEVEL_0,
        small={"T": 128, "D": 8},
    ),
    "prefix_attention": Budget(
        saved_per_token=lambda case, precision: 0,
        saved_per_call=0,
        flops_ratio=_prefix_flops,
        small={"T": 128, "L": 64, "P": 16, "H": 2, "G": 2, "K": 32},
    ),
}
