"""Row-wise kernels on more elements than 32 bits count: the last rows, which start beyond, come out as by themselves.

On a CPU the same checks run on few rows, so that they are known to work where there is memory for many."""

import pytest
import torch

from vlkernels import (
    bottleneck_adapter,
    gated_residual,
    mlp_projector,
    modality_linear,
    norm_residual,
    prefix_attention,
    use_backend,
)
from vlkernels.testing import compare, meter

LAST = 8
C = 4096


def vectors(*shapes: tuple[int, ...], device: str, std: float = 1.0) -> list[torch.Tensor]:
    g = torch.Generator(device).manual_seed(0)
    return [(torch.randn(s, generator=g, device=device) * std).bfloat16().requires_grad_() for s in shapes]


def norm(width: int, device: str):
    w, b = vectors((width,), (width,), device=device)
    return lambda x, other, index: norm_residual(x, other, w, b)


def gated(width: int, device: str):
    gate, w = vectors((1,), (width,), device=device)
    return lambda x, other, index: gated_residual(x, gate, other, norm_weight=w, norm="rms")[1]


def adapter(width: int, device: str):
    down, up = vectors((16, width), (width, 16), device=device, std=width**-0.5)
    return lambda x, other, index: bottleneck_adapter(x, down, up, residual=other)


def experts(width: int, device: str):
    w0, w1 = vectors((32, width), (32, width), device=device, std=width**-0.5)
    return lambda x, other, index: modality_linear(x, index, w0, w1)


def projector(width: int, device: str):
    w1, w2, w = vectors((32, width), (32, 32), (width,), device=device, std=width**-0.5)
    return lambda x, other, index: mlp_projector(x, w1, w2, norm="rms", norm_weight=w)


def prefix(width: int, device: str):
    heads = width // 32
    k, v, gate = vectors((1, 4, heads, 32), (1, 4, heads, 32), (heads,), device=device)

    def run(x, other, index):
        o, q = (t.view(1, -1, heads, 32) for t in (x, other))
        return prefix_attention(o, q, k, v, gate).view(x.shape)

    return run


OPS = {"norm_residual": norm, "gated_residual": gated, "bottleneck_adapter": adapter, "modality_linear": experts,
       "mlp_projector": projector, "prefix_attention": prefix}  # fmt: skip


def check(name: str, rows: int, width: int, device: str) -> None:
    """Output and gradient of the last rows in a batch of many, beside those of the same rows alone."""
    run = OPS[name](width, device)
    x, other = (torch.empty(rows, width, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    index = torch.arange(rows, device=device) % 2
    found = []
    for part in (slice(None), slice(rows - LAST, None)):
        mine, beside = (t[part].clone() if part.start else t for t in (x, other))
        mine.requires_grad_()
        with use_backend("triton"):
            y = run(mine, beside, index[part])
            (dx,) = torch.autograd.grad(y, mine, torch.ones_like(y))
        found.append([t[-LAST:].double() for t in (y.detach(), dx)])
        mine.requires_grad_(False)
        del y, dx
    for many, few in zip(*found, strict=True):
        # tiles, and with them the order of sums, may be others for few rows
        assert float((many - few).abs().max()) <= 2 * compare.ulp(float(few.abs().max()), torch.bfloat16)
        assert float(few.abs().max()) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_rows_past_two_to_the_31(name, device):
    if device != "cuda" or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of device memory")
    check(name, 2**31 // C + 5, C, device)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
@pytest.mark.parametrize("name", OPS)
def test_the_check_on_few_rows(name):
    check(name, 45, 64, "cpu")
