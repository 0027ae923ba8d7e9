"""Predictions that only a GPU can settle, each with what was predicted and why it matters.

python -m benchmarks.questions          needs a GPU
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from vlkernels import backends
from vlkernels.ops import _tl
from vlkernels.testing import clock, compare
from vlkernels.testing.case import PRECISIONS

from . import model, providers
from .ops import Job, callables, fresh
from .providers import Provider
from .providers.lora_linear import stock, swapped


@dataclass(frozen=True)
class Question:
    """prediction: in words with its unit; ask(device) -> (the answer in words, figures); matters: what it decides."""

    name: str
    question: str
    prediction: str
    matters: str
    ask: Callable[[str], tuple[str, dict]]


def row_stride(device: str, T: int = 8192, K: int = 4096, N: int = 4096, R: int = 128) -> tuple[str, dict]:
    """cuBLAS on x and W whose rows lie K + R apart, on packed ones, and on K + R columns."""
    wide = [torch.randn(rows, K + R, device=device).bfloat16() for rows in (T, N)]
    x, w = (t[:, :K] for t in wide)
    a, b = x.contiguous(), w.contiguous()
    times = {
        "packed": clock.measure([lambda: a @ b.t()], device).ms,
        "strided": clock.measure([lambda: x @ w.t()], device).ms,
        "extended": clock.measure([lambda: wide[0] @ wide[1].t()], device).ms,
    }
    strided, extended = times["strided"] / times["packed"], times["extended"] / times["packed"]
    return f"stride K+r takes {strided:.3f} of packed, K+r columns {extended:.3f}", times


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_bn, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) bᵀ, b (N, K); programs in groups of row blocks, so that the cache still holds b's tiles"""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * blocks_n)
    rows_here = tl.minimum(blocks_m - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * blocks_n)) % rows_here
    block_n = (program % (GROUP * blocks_n)) // rows_here
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * stride_am + offs_k[None, :]
    b_ptrs = b_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a = tl.load(a_ptrs, (offs_m[:, None] < M) & mask_k[None, :], 0.0)
        b = tl.load(b_ptrs, mask_k[:, None] & (offs_n[None, :] < N), 0.0)
        acc = _tl.dot(a, b, acc, "ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    c = _tl.cast(acc, c_ptr.dtype.element_ty)
    tl.store(c_ptr + offs_m[:, None].to(tl.int64) * stride_cm + offs_n[None, :], c, mask)


# (rows, columns, depth, warps, stages): the shapes that tutorials and libraries use on sm_90
LADDER = ((128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3))


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: tuple[int, ...]) -> torch.Tensor:
    """out = a bᵀ with contiguous columns."""
    rows, cols, depth, warps, stages = tile
    (m, k), n = a.shape, b.shape[0]
    matmul_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, cols),)](
        a, b, out, m, n, k, a.stride(0), b.stride(0), out.stride(0),
        BLOCK_M=rows, BLOCK_N=cols, BLOCK_K=depth, GROUP=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def triton_product(device: str, T: int = 8192, K: int = 4096, N: int = 4096) -> tuple[str, dict]:
    """The best of a short ladder of Triton products against cuBLAS, bf16."""
    a, b = torch.randn(T, K, device=device).bfloat16(), torch.randn(N, K, device=device).bfloat16()
    out = torch.empty(T, N, device=device, dtype=torch.bfloat16)
    want = a @ b.t()
    cublas = clock.measure([lambda: torch.mm(a, b.t(), out=out)], device).ms
    times = {}
    for tile in LADDER:
        try:
            got = matmul(a, b, out.fill_(float("nan")), tile)
        except OutOfResources:
            continue
        # both sum in float32 and round once, in another order
        if float((got - want).abs().max()) <= 4 * compare.ulp(float(want.abs().max()), torch.bfloat16):
            times["x".join(map(str, tile))] = clock.measure([lambda t=tile: matmul(a, b, out, t)], device).ms
    if not times:
        return "no tile of the ladder gave the right numbers", {"cublas": cublas}
    best = min(times, key=times.get)
    return f"{cublas / times[best]:.2f} of cuBLAS's rate (tile {best})", {"cublas": cublas} | times


def host_overhead(device: str) -> tuple[str, dict]:
    """Microseconds of host time per forward + backward on shapes too small for the device to matter."""
    op = backends.OPS["lora_linear"]
    case = dataclasses.replace(_first_case(op), dims={"T": 16, "K": 256, "N": 256, "R": 16})
    found = {}
    for provider in providers.of(op):
        if provider.name in ("compile", "frozen linear"):
            continue
        found[provider.name] = _host(op, provider, case, device)
    found["peft swapped"] = _host(op, Provider("swapped", swapped), case, device)
    return ", ".join(f"{name} {us:.0f} us" for name, us in found.items()), found


def _host(op, provider: Provider, case, device: str) -> float:
    instance = fresh(Job(op, case, PRECISIONS["bf16+fp32 amp"], provider), 0, device)
    dy = torch.randn_like(instance.forward())
    # few calls a round: beyond about a thousand queued launches the host waits for the device
    return clock.host_microseconds(lambda: instance.backward(instance.forward(), dy), device, n=40, rounds=10)


ROWS = (1, 16, 64, 128, 256, 512, 1024)


def break_even(device: str, rows: tuple[int, ...] = ROWS) -> tuple[str, dict]:
    """Stock peft over the swapped layer, forward + backward, by row count."""
    op, precision = backends.OPS["lora_linear"], PRECISIONS["bf16+fp32 amp"]
    found = {}
    for T in rows:
        case = dataclasses.replace(_first_case(op), dims={**_first_case(op).dims, "T": T})
        sets = clock.sets_past_cache(sum(compare.cases_of(op).floor_bytes(case, 2).values()), device)
        times = []
        for provider in (Provider("peft", stock), Provider("swapped", swapped, "ours")):
            calls = list(callables(Job(op, case, precision, provider), "forward+backward", device, sets))
            times.append(clock.measure(calls, device, 0.2).ms)
        found[str(T)] = times[1] / times[0]
    losing = [T for T in rows if found[str(T)] > 1]
    verdict = f"loses up to {max(losing)} rows" if losing else "loses nowhere"
    return verdict + "; ours / peft " + ", ".join(f"{T}: {r:.2f}" for T, r in found.items()), found


def _first_case(op):
    return next(c for c in compare.cases_of(op).CASES if "bench" in c.tags)


QUESTIONS = (
    Question(
        "row stride",
        "cuBLAS, 8192x4096x4096 bf16: rows K+128 apart against packed rows",
        "1.00 of packed; K+128 columns 1.03",
        "whether packed storage [W, sB] lets cuBLAS do the low-rank term for the price of its columns",
        row_stride,
    ),
    Question(
        "Triton product",
        "Triton GEMM against cuBLAS, 8192x4096x4096 bf16",
        f"{0.80 / model.PRODUCT:.2f} of cuBLAS's rate",
        "whether a fused Triton main loop could pay: it gives back what it wins when it is much slower",
        triton_product,
    ),
    Question(
        "host overhead",
        "host time per call, forward + backward, of the op and of plain torch",
        "54 us for the registered operator's frame, 38 us for a plain autograd function, launches apart",
        "below which row count the layer is bound by the host",
        host_overhead,
    ),
    Question(
        "break-even",
        "rows below which the swapped layer loses to stock peft (4096x4096, r = 128, p = 0.05, fp32 adapters, amp)",
        "loses below 512 rows",
        "the row count that `declines` should name",
        break_even,
    ),
)


def answer(question: Question, device: str) -> dict:
    """The question's record; a failure is an answer too."""
    blank = {"name": question.name, "question": question.question, "prediction": question.prediction}
    try:
        measured, figures = question.ask(device)
    except Exception as error:  # one question's failure leaves the others
        measured, figures = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", {}
    return blank | {"matters": question.matters, "measured": measured, "figures": figures}


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: these questions need one")
        return 2
    for question in QUESTIONS:
        found = answer(question, "cuda")
        print(f"{question.question}\n  predicted: {found['prediction']}\n  measured:  {found['measured']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
