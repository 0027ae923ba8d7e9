"""selective_scan_2d beside plain PyTorch, as VMamba's SS2D writes it: the map copied in each direction's order, Mamba's
scan over the copies, and the results put back into place and added."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops.selective_scan_2d.reference import ORDERS
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, compiled, plain

BASELINE = "eager"


def ordered(t: Tensor, letter: str, height: int, width: int) -> Tensor:
    """A copy (B, C, L) of t (B, L, C) in the order of one direction."""
    column, backwards = ORDERS[letter]
    grid = t.transpose(1, 2).unflatten(2, (height, width))
    flat = (grid.transpose(2, 3) if column else grid).flatten(2).contiguous()
    return flat.flip(2) if backwards else flat


def placed(y: Tensor, letter: str, height: int, width: int) -> Tensor:
    """Back: (B, C, L) in a direction's order as row-major tokens."""
    column, backwards = ORDERS[letter]
    y = y.flip(2) if backwards else y
    return y.unflatten(2, (width, height)).transpose(2, 3).flatten(2) if column else y


def scan_of_copies(u, delta, a, b, c, d, delta_bias, state, softplus: bool) -> tuple[Tensor, Tensor]:
    """Mamba's reference scan in float32: u, delta (B, C, L); b, c (B, G, S, L) -> (B, C, L), (B, C, S)."""
    u, delta, a, b, c = (t.float() for t in (u, delta, a, b, c))
    if delta_bias is not None:
        delta = delta + delta_bias[..., None].float()
    delta = F.softplus(delta) if softplus else delta
    b, c = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (b, c))
    decay = torch.exp(torch.einsum("bcl,cs->bcls", delta, a))
    taken = torch.einsum("bcl,bcsl,bcl->bcls", delta, b, u)
    h = u.new_zeros(*u.shape[:2], a.shape[1]) if state is None else state.float()
    steps = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + taken[:, :, t]
        steps.append(torch.einsum("bcs,bcs->bc", h, c[..., t]))
    y = torch.stack(steps, 2)
    return y if d is None else y + u * d[:, None].float(), h


def equation(
    u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus, scanned: Callable = scan_of_copies
) -> tuple[Tensor, Tensor]:
    """The op's equation over copies; every tensor as the op takes it. scanned: the scan of all copies."""
    (B, L, D), (K, G, S) = u.shape, b.shape[2:]
    u_k = torch.stack([ordered(u, letter, height, width) for letter in scan], 1)
    delta_k, b_k, c_k = (
        torch.stack([ordered(t[:, :, k].flatten(2), letter, height, width) for k, letter in enumerate(scan)], 1)
        for t in (delta, b, c)
    )
    state = None if state is None else state.flatten(1, 2)
    b_k, c_k = (t.view(B, K * G, S, L) for t in (b_k, c_k))
    y, last = scanned(u_k.flatten(1, 2), delta_k.flatten(1, 2), a, b_k, c_k, d, delta_bias, state, softplus)
    y = y.unflatten(1, (K, D))
    total = sum(placed(y[:, k], letter, height, width) for k, letter in enumerate(scan)).transpose(1, 2)
    if z is not None:
        total = total * F.silu(z.float())
    return total.to(u.dtype).contiguous(), last.unflatten(1, (K, D))


PROVIDERS = (Provider("eager", plain(equation)), Provider("compile", plain(compiled(equation))))


def _mamba_ssm(case: Case, kw: dict, precision: Precision) -> Instance:
    """mamba-ssm's CUDA scan over the copies that VMamba makes for it, all directions at once."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"mamba_ssm is not importable: {error}") from None
    if kw.get("state") is not None:
        raise Unavailable("mamba_ssm's scan starts without a state")

    def scanned(u, delta, a, b, c, d, delta_bias, state, softplus):
        wide = [t if t is None else t.float() for t in (a, d, delta_bias)]
        b, c = (t.to(u.dtype) for t in (b, c))
        return selective_scan_fn(
            u, delta.to(u.dtype), wide[0], b, c, wide[1], None, wide[2], softplus, return_last_state=True
        )

    return plain(functools.partial(equation, scanned=scanned))(case, kw, precision)


PEERS = (Provider("mamba-ssm", _mamba_ssm, "peer"),)
