"""The ceilings of a device on random data: bytes a second of a large copy, FLOPs a second of a large product."""

from __future__ import annotations

import torch

from vlkernels.testing import clock


def measure(device: str, copy_bytes: int = 4 << 30, size: int = 8192) -> dict[str, float]:
    """copy_tbs: bytes read plus bytes written over time, 10^12 a second; bf16_tflops, fp32_tflops: size^3 products."""
    found = {"copy_tbs": _copy_tbs(device, copy_bytes)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"{name}_tflops"] = _product_tflops(device, size, dtype)
    return found


def _copy_tbs(device: str, copy_bytes: int) -> float:
    source = torch.empty(copy_bytes // 4, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    return 2 * copy_bytes / clock.measure([lambda: target.copy_(source)], device, most=30).ms * 1e-9


def _product_tflops(device: str, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / clock.measure([lambda: torch.mm(a, b, out=out)], device, most=30).ms * 1e-9


def floor_ms(flops: int, fewest_bytes: int, precision_is_fp32: bool, ceilings: dict[str, float]) -> float:
    """The larger of arithmetic at the matrix ceiling and traffic at the copy ceiling, in milliseconds."""
    rate = ceilings["fp32_tflops" if precision_is_fp32 else "bf16_tflops"]
    return max(flops / rate, fewest_bytes / ceilings["copy_tbs"]) * 1e-9
