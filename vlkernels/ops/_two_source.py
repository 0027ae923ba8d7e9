"""The compiled product over two sources, one fp32 accumulator for both: a LoRA linear in one kernel, on sm_90a alone.

Dims: T rows, K input width, N output width, R rank. All operands share one dtype, bfloat16 or float16; sums in float32,
rounded once. Nothing here has been timed on a GPU yet. The kernels: csrc/two_source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ._dropout import threshold

DTYPES = (torch.bfloat16, torch.float16)
MAX_RANK = 512
_MOST = 2**31 - 1 - 256  # coordinates of bulk copies are 32 bits wide, and a tile reaches past the last row


@torch.compiler.assume_constant_result
def missing(device: int | None = None) -> str | None:
    """Why the kernels cannot run on this CUDA device (default: the current one), or None."""
    reason = _library.load()
    if reason is not None:
        return reason
    info = _library.info()
    if "two_source" not in info["ops"]:
        return "the library was built without CUTLASS's headers or without sm_90a: it holds no two_source kernels"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return "the device is sm_{}{}; the kernels run on sm_90 alone".format(*capability)
    return None


def refuses(**operands: Tensor | None) -> str | None:
    """Why the kernels cannot take these operands (the arguments of a function below, by name), or None.

    Matrices: two dimensions, unit stride along the last, rows aligned to 16 bytes (bulk copies read nothing else).
    Vectors (bias, lora_bias): contiguous. `out` and `pre` are no operands: their rows need no alignment.
    """
    given = {name: t for name, t in operands.items() if t is not None}
    dtype = next(iter(given.values())).dtype
    for name, t in given.items():
        if t.dtype not in DTYPES:
            return f"{name} is {t.dtype}; the kernels take bfloat16 and float16"
        if t.dtype != dtype:
            return f"{name} is {t.dtype}, {next(iter(given))} {dtype}; the kernels take one dtype"
        reason = _vector(name, t) if name in ("bias", "lora_bias") else _matrix(name, t)
        if reason is not None:
            return reason
    rank = next((given[name].shape[1] for name in ("s", "ds") if name in given), 0)
    return f"the rank is {rank}; the kernels take 1 to {MAX_RANK}" if rank > MAX_RANK else None


def forward(
    x2: Tensor,
    weight: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """out (T, N) = scale * (s bᵀ + lora_bias) + x2 weightᵀ + bias.

    x2 (T, K), weight (N, K), s (T, R) = drop(x2) aᵀ, b (N, R), bias and lora_bias (N,). Raises RuntimeError naming the
    operand that does not fit; `refuses` says so beforehand.
    """
    out = x2.new_empty((x2.shape[0], weight.shape[0])) if out is None else out
    torch.ops.vlkernels_cuda.two_source_forward(x2, weight, s, b, bias, lora_bias, scale, False, None, out)
    return out


def backward_dx(
    dy2: Tensor, weight: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, p: float, out: Tensor | None = None
) -> Tensor:
    """out (T, K) = keep_mask(seed, T, K, p) / (1 - p) * (ds a) + dy2 weight.

    dy2 (T, N), weight (N, K), ds (T, R), a (R, K); seed 0-d int64, needed when p > 0.
    """
    out = dy2.new_empty((dy2.shape[0], weight.shape[1])) if out is None else out
    seed = None if threshold(p) == 0 else seed
    torch.ops.vlkernels_cuda.two_source_backward(dy2, weight, ds, a, seed, p, out)
    return out


def linear_act(
    x2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    out: Tensor | None = None,
    pre: Tensor | None = None,
) -> Tensor:
    """out (T, N) = act(x2 weightᵀ + bias), act "none" or "gelu" (erf); `pre`, where given, gets act's argument."""
    if act not in ("none", "gelu"):
        raise ValueError(f"act is {act!r}; accepted: none, gelu")
    out = x2.new_empty((x2.shape[0], weight.shape[0])) if out is None else out
    torch.ops.vlkernels_cuda.two_source_forward(x2, weight, None, None, bias, None, 1.0, act == "gelu", pre, out)
    return out


def _matrix(name: str, t: Tensor) -> str | None:
    if t.dim() != 2:
        return f"{name} has shape {tuple(t.shape)}; the kernels take two dimensions"
    rows, cols = t.shape
    if cols == 0:
        return f"{name} has no columns: shape {tuple(t.shape)}"
    if max(rows, cols) > _MOST:
        return f"{name} has shape {tuple(t.shape)}; the kernels take sizes up to {_MOST}"
    if cols > 1 and t.stride(1) != 1:
        return f"{name} has stride {t.stride(1)} along its last dimension; the kernels take 1"
    # the rows of a matrix of one row are never stepped over
    if rows > 1 and (t.stride(0) < cols or t.stride(0) % 8):
        return f"{name} has row stride {t.stride(0)}; bulk copies take multiples of 8 elements, at least {cols} here"
    # traced tensors have no address; torch's own allocations begin at multiples of 512 bytes
    address = t.storage_offset() * t.element_size() if torch.compiler.is_compiling() else t.data_ptr()
    if rows and address % 16:
        return f"{name} begins at an address that is no multiple of 16 bytes"
    return None


def _vector(name: str, t: Tensor) -> str | None:
    if t.dim() != 1 or (t.shape[0] > 1 and t.stride(0) != 1):
        return f"{name} has shape {tuple(t.shape)}, strides {tuple(t.stride())}; the kernels take a contiguous vector"
    return None
