"""Launches of the depthwise convolution's kernels, shared by the ops that have one, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import _tl
from ._conv import out_side
from ._depthwise_kernels import (
    depthwise_bwd_kernel,
    depthwise_excite_kernel,
    depthwise_fwd_kernel,
    depthwise_rows_bwd_kernel,
)
from ._device import arch, multiprocessors

MAX_CHANNELS = 4096  # with a norm one program holds all channels of a token
HELD_CHANNELS = 2048  # and up to here their nine weights: with 16 warps they would spill


@dataclass(frozen=True)
class Tiles:
    """rows x channels a step of a program; chunk: its tokens, chunks: programs an image, each with a partial sum."""

    rows: int
    channels: int
    warps: int
    chunk: int
    chunks: int


@dataclass(frozen=True)
class Config:
    forward: Tiles  # all channels where there is a norm
    rows: Tiles  # through activation and norm, over the outputs
    backward: Tiles  # through the taps, over the inputs


def config(images: int, tokens: int, out_tokens: int, channels: int, norm: bool, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    whole = triton.next_power_of_2(channels)
    # 4 elements a thread: nine weights and ten sums of each are held in registers
    part = min(128, max(16, whole))

    def tiles(count: int, block: int, least: int, wide: int = 128) -> Tiles:
        blocks = triton.cdiv(channels, block)
        most = max(1, (512 if block >= 128 else 2048) // block)
        # a partial sum costs 4 bytes a channel, or 40 of the taps, beside 4 to 8 of each token of the chunk
        wanted = triton.cdiv(8 * multiprocessors(device_arch), max(1, images * blocks))
        chunk = max(least, most, triton.cdiv(count, wanted))
        rows = min(most, triton.next_power_of_2(min(chunk, count)))
        warps = max(1, min(16, rows * block // (wide if block > 512 else 128)))
        return Tiles(rows, block, warps, chunk, triton.cdiv(count, chunk))

    block = whole if norm else part
    # with 8 elements a thread the pass through the norm spills on sm_100
    return Config(tiles(out_tokens, block, 16, 256), tiles(out_tokens, block, 32), tiles(tokens, part, 64))


def refuses(x: Tensor, norm: bool) -> str | None:
    """Why x has no kernel, or None."""
    if norm and x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels to normalise; kernels take up to {MAX_CHANNELS}"
    return None


def rows_of(x: Tensor) -> Tensor:
    """x (B, N, C) with contiguous channels; a view where there is one."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def convolve(
    x, weight, bias, gamma, beta, h: int, w: int, stride: int, skip: bool, norm: bool, act: str, eps: float,
    dtype: torch.dtype, want_y: bool = True, want_c: bool = False, want_means: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, c (B, N', C), stats (B N', 2), the means of y over the tokens (B, C) in float32; empty what is not wanted."""
    (B, N, C), out_h, out_w = x.shape, out_side(h, stride), out_side(w, stride)
    count = out_h * out_w
    made = {"device": x.device}
    y, c = (torch.empty((B, count, C) if want else 0, dtype=dtype, **made) for want in (want_y, want_c))
    stats = torch.empty((B * count, 2) if norm else 0, dtype=torch.float32, **made)
    tiles = config(B, N, count, C, norm, arch(x)).forward
    if tiles.channels >= 4096 and x.element_size() == 4:
        # 4 elements a thread, as a load of float32 has: with 8 of them the nine taps do not fit into 128 registers
        tiles = replace(tiles, warps=32)
    parts = torch.empty((B, tiles.chunks, C) if want_means else 0, dtype=torch.float32, **made)
    if B:
        x, held = rows_of(x), tiles.channels <= HELD_CHANNELS
        weight = flat(weight) if held else flat(weight).t().contiguous()
        depthwise_fwd_kernel[(B * tiles.chunks, triton.cdiv(C, tiles.channels))](
            x, weight, bias, gamma, beta, y, c, stats, parts, h, w, out_w, count, C, tiles.chunks, tiles.chunk,
            x.stride(0), x.stride(1), eps,
            STRIDE=stride, SKIP=skip, NORM=norm, ACT=act, COMPUTE=_tl.TL_DTYPE[dtype], HAS_BIAS=bias is not None,
            HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_Y=want_y, HAS_C=want_c, HAS_SUMS=want_means,
            HELD=held, BLOCK_T=tiles.rows, BLOCK_C=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
    return y, c, stats, mean_of(parts, count) if want_means else parts


def mean_of(parts: Tensor, count: int) -> Tensor:
    """(B, chunks, C) partial sums over `count` tokens as their mean (B, C)."""
    return parts.sum(1).mul_(1.0 / count)


def flat(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) with a channel's nine weights side by side, whatever their strides."""
    return weight.reshape(weight.shape[0], 9).contiguous()


def excite(c, stats, gamma, beta, scale, dys, act: str, images: int, tokens_in: int, want_ys: bool, want_sums: bool):
    """ys = act(norm(c)) scale (B, N', C), and the sums of dys act(norm(c)) over the tokens (B, C) in float32."""
    C = c.shape[-1]
    count = c.shape[1]
    ys = torch.empty_like(c) if want_ys else None
    tiles = config(images, tokens_in, count, C, True, arch(c)).forward
    parts = torch.empty((images, tiles.chunks, C), dtype=torch.float32, device=c.device) if want_sums else None
    if images:
        depthwise_excite_kernel[(images * tiles.chunks, triton.cdiv(C, tiles.channels))](
            c, stats, gamma, beta, scale, dys, ys, parts, count, C, tiles.chunks, tiles.chunk,
            ACT=act, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_YS=want_ys, HAS_SUMS=want_sums,
            BLOCK_T=tiles.rows, BLOCK_C=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
    return ys, None if parts is None else parts.sum(1)


def rows_backward(
    dy, scale, dmeans, c, stats, gamma, beta, norm: bool, act: str, shape: tuple[int, int, int], tokens_in: int,
    dtype: torch.dtype, device, want_dc: bool, want_sums: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dc (B, N', C), and partial sums of the gradients of gamma and beta (2, programs, C) in float32.

    c: None without norm and activation.
    """
    B, count, C = shape
    tiles = config(B, tokens_in, count, C, norm, arch(dy if dy is not None else dmeans)).rows
    dc = torch.empty(shape, dtype=dtype, device=device) if want_dc else None
    parts = torch.empty((2, B * tiles.chunks, C), dtype=torch.float32, device=device) if want_sums else None
    if B and (want_dc or want_sums):
        dy = None if dy is None else rows_of(dy)
        dmeans = None if dmeans is None else dmeans.contiguous()
        depthwise_rows_bwd_kernel[(B * tiles.chunks, triton.cdiv(C, tiles.channels))](
            dy, scale, dmeans, c, stats, gamma, beta, dc, parts, count, C, tiles.chunks, tiles.chunk,
            0 if dy is None else dy.stride(0), 0 if dy is None else dy.stride(1), 1.0 / count,
            NORM=norm, ACT=act, HAS_DY=dy is not None, HAS_SCALE=scale is not None, HAS_DMEANS=dmeans is not None,
            HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_DC=want_dc, HAS_SUMS=want_sums,
            BLOCK_T=tiles.rows, BLOCK_C=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
    return dc, parts


def backward(
    dc, x, weight, h: int, w: int, stride: int, skip: bool, norm: bool, dtype: torch.dtype, dx_dtype: torch.dtype,
    want_dx: bool, want_sums: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx (B, N, C), and partial sums (programs, 10 C) in float32: 9 C of the weight, as it lies, C of the bias."""
    (B, N, C), out_h, out_w = x.shape, out_side(h, stride), out_side(w, stride)
    dx = torch.empty((B, N, C), dtype=dx_dtype, device=x.device) if want_dx else None
    tiles = config(B, N, out_h * out_w, C, norm, arch(x)).backward
    parts = torch.empty((B * tiles.chunks, 10 * C), dtype=torch.float32, device=x.device) if want_sums else None
    if B and (want_dx or want_sums):
        x, dc, weight = rows_of(x), rows_of(dc), flat(weight)
        depthwise_bwd_kernel[(B * tiles.chunks, triton.cdiv(C, tiles.channels))](
            dc, x, weight, dx, parts, w, out_h, out_w, N, C, tiles.chunks, tiles.chunk, x.stride(0), x.stride(1),
            dc.stride(0), dc.stride(1),
            STRIDE=stride, SKIP=skip, COMPUTE=_tl.TL_DTYPE[dtype], HAS_DX=want_dx, HAS_SUMS=want_sums,
            BLOCK_T=tiles.rows, BLOCK_C=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
    return dx, parts


def tap_gradients(parts: Tensor, weight: Tensor, bias: Tensor | None, needs: dict, names: tuple[str, str]) -> dict:
    """The gradients of weight and bias from their partial sums, under `names`, where needed."""
    C, grads = weight.shape[0], {}
    if needs[names[0]]:
        grads[names[0]] = parts[:, : 9 * C].sum(0).to(weight.dtype).view(weight.shape)
    if needs.get(names[1]):
        grads[names[1]] = parts[:, 9 * C :].sum(0).to(bias.dtype)
    return grads
