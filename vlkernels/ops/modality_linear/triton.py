"""modality_linear in Triton: a tile of rows runs the products of the experts that it has, on its own rows.

Rows of one modality come in runs, so that a tile has one expert but where a run ends inside it. The rows of other
experts are masked out of the load, so that all products of a tile add into one accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _refuse, _tl
from .._device import arch


def refuses(x, index, w0, w1, w2, w3, b0, b1, b2, b3, gate, act, dtype) -> str | None:
    if (reason := _refuse.common(x, dtype, w0=w0, w1=w1, gate=gate)) is not None:
        return reason
    if w0.shape[0] == 0 or w0.shape[1] == 0:
        return f"zero channels: w0 {tuple(w0.shape)}"
    return None


def declines(*values) -> str | None:
    return None


def forward(x, index, w0, w1, w2, w3, b0, b1, b2, b3, gate, act, dtype) -> tuple[Tensor]:
    """y (..., N)."""
    compute = dtype or x.dtype
    weights, biases = _given(w0, w1, w2, w3), (b0, b1, b2, b3)
    y = torch.empty((*x.shape[:-1], w0.shape[0]), dtype=compute, device=x.device)
    rows = _rows(x, compute) if gate is None else _gated(_rows(x, compute), _rows(gate, compute), act)
    _product(rows, _numbers(index), [w.to(compute) for w in weights], biases, y.view(-1, w0.shape[0]))
    return (y,)


def backward(dy, saved, needs, act, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, gate, index, w0 = saved["x"], saved["gate"], _numbers(saved["index"]), saved["w0"]
    compute = dtype or x.dtype
    dy = _rows(dy, compute)
    grads: dict[str, Tensor] = {}
    products = any(needs[f"w{e}"] for e in range(4))
    rows = _rows(x, compute) if products or gate is not None else dy
    dx = None
    if needs["x"] or needs["gate"]:
        weights = [w.to(compute).t() for w in _given(*(saved[f"w{e}"] for e in range(4)))]
        dx = torch.empty((dy.shape[0], w0.shape[1]), dtype=compute, device=x.device)
        _product(dy, index, weights, (None,) * 4, dx)
    if gate is not None:
        rows, dx, dgate = _gated_backward(rows, _rows(gate, compute), dx, act, products, needs["gate"])
        if needs["gate"]:
            grads["gate"] = dgate.view(gate.shape).to(gate.dtype)
    if needs["x"]:
        grads["x"] = dx.view(x.shape).to(x.dtype)
    for e in range(4):
        wanted = {name: saved[name] for name in (f"w{e}", f"b{e}") if needs[name]}
        found = _outer(dy, rows, index, e, f"w{e}" in wanted, f"b{e}" in wanted, w0.shape[1]) if wanted else {}
        grads |= {name: found[name[0]].to(t.dtype) for name, t in wanted.items()}
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tiles of a product: rows x cols of its result, depth of what is summed; group: row blocks that go together."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


def config(rows: int, cols: int, depth: int, dtype: torch.dtype, device_arch: int, outer: bool = False) -> Config:
    """Of a product with `rows` x `cols` results over `depth`; `outer`: the gradient of a weight, summed over rows of x.

    None of the steps below has been timed on a GPU yet.
    """
    wide = dtype == torch.float32  # three tf32 passes: operands and their splits take twice the registers
    # 256 columns read x half as often; where operands go through registers (sm_80, sm_100) they and a bias spill
    most = 64 if wide else 256 if device_arch in (0, 90) and not outer else 128
    block = lambda n, top: max(16, min(top, triton.next_power_of_2(n)))  # noqa: E731
    return Config(
        block(rows, 64 if wide else 128),
        block(cols, most),
        block(depth, 32 if wide else 64),
        warps=4 if wide else 8,
        stages=2 if wide else 3,
    )


_BLOCK = 1024  # elements of a program of the gate's passes: 8 a thread, one load of 16 bytes in 16 bits

# -- launches ------------------------------------------------------------------------------------------------------


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _numbers(index: Tensor) -> Tensor:
    """(...) of any integers or booleans as contiguous int32 (rows,)."""
    return index.reshape(-1).to(torch.int32).contiguous()


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., C) as (rows, C) in `dtype` with contiguous columns; a view where there is one."""
    t = t.to(dtype).reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _gated(x: Tensor, gate: Tensor, act: str) -> Tensor:
    """act(gate) * x (rows, K)."""
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if h.numel():
        modality_linear_gate_kernel[_grid(x)](
            x, gate, h, x.shape[1], x.stride(0), gate.stride(0), ACT=act, BLOCK=_BLOCK, num_warps=4
        )
    return h


def _gated_backward(
    x: Tensor, gate: Tensor, dh: Tensor | None, act: str, again: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h = act(gate) * x once more if `again`, dx over dh's memory, dgate if it is needed."""
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if again else None
    dgate = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_gate else None
    if x.numel() and (again or dh is not None):
        modality_linear_gate_bwd_kernel[_grid(x)](
            x, gate, dh, h, dgate, x.shape[1], x.stride(0), gate.stride(0), ACT=act, HAS_H=again,
            HAS_DH=dh is not None, HAS_DGATE=need_gate, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return h, dh, dgate


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], _BLOCK)


def _product(x: Tensor, index: Tensor, weights: list[Tensor], biases: tuple, out: Tensor) -> None:
    """out[t] = x[t] W_eᵀ + b_e, e = index[t]; the weights share their strides."""
    (rows, depth), cols = x.shape, out.shape[1]
    if rows == 0:
        return
    # one pair of strides serves all: weights of other strides are copied, which parameters are not
    same = {w.stride() for w in weights}
    weights = weights if len(same) == 1 else [w.contiguous() for w in weights]
    tile = config(rows, cols, depth, x.dtype, arch(x))
    modality_linear_product_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),)](
        x, index, *weights, *[None] * (4 - len(weights)), *biases, out, rows, depth, cols, x.stride(0),
        *weights[0].stride(),
        EXPERTS=len(weights), HAS_B0=biases[0] is not None, HAS_B1=biases[1] is not None,
        HAS_B2=biases[2] is not None, HAS_B3=biases[3] is not None, BLOCK_T=tile.rows, BLOCK_N=tile.cols,
        BLOCK_K=tile.depth, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages, **_tl.product(x.dtype),
    )  # fmt: skip


def _outer(
    dy: Tensor, x: Tensor, index: Tensor, expert: int, product: bool, sums: bool, depth: int
) -> dict[str, Tensor]:
    """w: dyᵀ x over the rows of one expert (N, K) in dy's dtype; b: the sums of dy over them in float32."""
    rows, cols = dy.shape
    dw = torch.empty((cols, depth) if product else 0, dtype=dy.dtype, device=dy.device)
    db = torch.empty(cols if sums else 0, dtype=torch.float32, device=dy.device)
    tile = config(cols, depth if product else 1, rows, dy.dtype, arch(dy), outer=True)
    blocks = triton.cdiv(depth, tile.cols) if product else 1
    modality_linear_outer_kernel[(blocks, triton.cdiv(cols, tile.rows))](
        dy, x, index, dw, db, rows, cols, depth, expert, dy.stride(0), x.stride(0),
        HAS_DW=product, HAS_DB=sums, BLOCK_N=tile.rows, BLOCK_K=tile.cols, BLOCK_T=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(dy.dtype),
    )  # fmt: skip
    return {"w": dw, "b": db}


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def modality_linear_gate_kernel(
    x_ptr, gate_ptr, h_ptr, K, stride_xt, stride_gt, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    """h = act(gate) * x"""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < K
    x = tl.load(x_ptr + row * stride_xt + offs_k, mask_k, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gt + offs_k, mask_k, 0.0).to(tl.float32)
    tl.store(h_ptr + row * K + offs_k, _tl.cast(_tl.act(gate, ACT) * x, h_ptr.dtype.element_ty), mask_k)


@triton.jit
def modality_linear_gate_bwd_kernel(
    x_ptr, gate_ptr, dh_ptr, h_ptr, dgate_ptr, K, stride_xt, stride_gt,
    ACT: tl.constexpr, HAS_H: tl.constexpr, HAS_DH: tl.constexpr, HAS_DGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = act(gate) * x, dx = act(gate) * dh over dh, dgate = act'(gate) * x * dh"""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < K
    x = tl.load(x_ptr + row * stride_xt + offs_k, mask_k, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gt + offs_k, mask_k, 0.0).to(tl.float32)
    opened = _tl.act(gate, ACT)
    offs = row * K + offs_k
    if HAS_H:
        tl.store(h_ptr + offs, _tl.cast(opened * x, h_ptr.dtype.element_ty), mask_k)
    if HAS_DH:
        dh = tl.load(dh_ptr + offs, mask_k, 0.0).to(tl.float32)
        if HAS_DGATE:
            dgate = dh * x * _tl.act_derivative(gate, ACT)
            tl.store(dgate_ptr + offs, _tl.cast(dgate, dgate_ptr.dtype.element_ty), mask_k)
        tl.store(dh_ptr + offs, _tl.cast(dh * opened, dh_ptr.dtype.element_ty), mask_k)


@triton.jit
def modality_linear_product(
    acc, x_ptrs, w_ptr, bias_ptr, mine, offs_n, mask_n, K, stride_wn, stride_wk, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x wᵀ + bias for the rows that are `mine`; others stay as they are"""
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptrs + k, mine[:, None] & mask_k[None, :], 0.0)
        # (BLOCK_K, BLOCK_N)
        w = tl.load(w_ptrs, mask_k[:, None] & mask_n[None, :], 0.0)
        acc = _tl.dot(x, w, acc, PRECISION)
        w_ptrs += step_w
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)
        acc += tl.where(mine[:, None], bias[None, :], 0.0)
    return acc


@triton.jit
def modality_linear_product_kernel(
    x_ptr, index_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, y_ptr, T, K, N,
    stride_xt, stride_wn, stride_wk,
    EXPERTS: tl.constexpr, HAS_B0: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, HAS_B3: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[t] = x[t] W_eᵀ + b_e, e = index[t]"""
    # GROUP row blocks go through the columns together: their x and each block of w are read while the cache holds them
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * blocks_n)
    rows_here = tl.minimum(tl.cdiv(T, BLOCK_T) - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_n)
    offs_t = (group * GROUP + inside % rows_here).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = inside // rows_here * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    expert = tl.load(index_ptr + offs_t, mask_t, 0).to(tl.int32)
    expert = tl.where(mask_t, expert, -1)
    x_ptrs = x_ptr + offs_t[:, None] * stride_xt + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if tl.max((expert == 0).to(tl.int32), 0) > 0:
        acc = modality_linear_product(
            acc,
            x_ptrs,
            w0_ptr,
            b0_ptr,
            expert == 0,
            offs_n,
            mask_n,
            K,
            stride_wn,
            stride_wk,
            HAS_B0,
            PRECISION,
            BLOCK_K,
        )
    if tl.max((expert == 1).to(tl.int32), 0) > 0:
        acc = modality_linear_product(
            acc,
            x_ptrs,
            w1_ptr,
            b1_ptr,
            expert == 1,
            offs_n,
            mask_n,
            K,
            stride_wn,
            stride_wk,
            HAS_B1,
            PRECISION,
            BLOCK_K,
        )
    if EXPERTS > 2:  # noqa: SIM102  (the outer condition is the compiler's)
        if tl.max((expert == 2).to(tl.int32), 0) > 0:
            acc = modality_linear_product(
                acc,
                x_ptrs,
                w2_ptr,
                b2_ptr,
                expert == 2,
                offs_n,
                mask_n,
                K,
                stride_wn,
                stride_wk,
                HAS_B2,
                PRECISION,
                BLOCK_K,
            )
    if EXPERTS > 3:  # noqa: SIM102
        if tl.max((expert == 3).to(tl.int32), 0) > 0:
            acc = modality_linear_product(
                acc,
                x_ptrs,
                w3_ptr,
                b3_ptr,
                expert == 3,
                offs_n,
                mask_n,
                K,
                stride_wn,
                stride_wk,
                HAS_B3,
                PRECISION,
                BLOCK_K,
            )
    y_ptrs = y_ptr + offs_t[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, _tl.cast(acc, PRODUCT), mask_t[:, None] & mask_n[None, :])


@triton.jit
def modality_linear_outer_kernel(
    dy_ptr, x_ptr, index_ptr, dw_ptr, db_ptr, T, N, K, expert, stride_dyt, stride_xt,
    HAS_DW: tl.constexpr, HAS_DB: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW_e = the sum of dy[t]ᵀ x[t] over the rows of one expert, db_e = the sum of dy[t]

    A tile without such rows costs its index alone. The condition keeps the loads of the next tile from being in flight
    during this one's product; two programs on a multiprocessor overlap instead.
    """
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        mine = mask_t & (tl.load(index_ptr + offs_t, mask_t, 0).to(tl.int32) == expert)
        if tl.max(mine.to(tl.int32), 0) > 0:
            # (BLOCK_N, BLOCK_T)
            rows_t = offs_t.to(tl.int64)
            dy = tl.load(dy_ptr + rows_t[None, :] * stride_dyt + offs_n[:, None], mine[None, :] & mask_n[:, None], 0.0)
            if HAS_DB:
                sums += tl.sum(dy.to(tl.float32), 1)
            if HAS_DW:
                # (BLOCK_T, BLOCK_K)
                x = tl.load(x_ptr + rows_t[:, None] * stride_xt + offs_k[None, :], mine[:, None] & mask_k[None, :], 0.0)
                acc = _tl.dot(dy, x, acc, PRECISION)
    if HAS_DW:
        dw_ptrs = dw_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        tl.store(dw_ptrs, _tl.cast(acc, PRODUCT), mask_n[:, None] & mask_k[None, :])
    if HAS_DB:
        # every column block has the same sums; the first writes them
        tl.store(db_ptr + offs_n, sums, mask_n & (tl.program_id(0) == 0))
