"""What every Triton kernel refuses alike."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _tl

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def common(x: Tensor, dtype: torch.dtype | None, /, **tensors: Tensor | None) -> str | None:
    """Why no Triton kernel can run on x's device, or on the dtypes of x and `tensors`; None when one can."""
    if x.is_meta or not (x.is_cuda or _tl.INTERPRETED.value):
        return f"x is on {x.device.type}; Triton kernels run on CUDA devices (or with TRITON_INTERPRET=1 anywhere)"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    for name, t in (("x", x), *tensors.items()):
        if t is not None and t.dtype not in KERNEL_DTYPES:
            return f"{name} is {t.dtype}; kernels take float32, bfloat16, float16"
    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"dtype is {dtype}; kernels take float32, bfloat16, float16"
    return None
