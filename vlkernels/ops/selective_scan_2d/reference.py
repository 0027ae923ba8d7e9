"""selective_scan_2d: the selective state-space scan over the tokens of an image, in several directions that are summed.

The recurrence of Mamba (arXiv 2312.00752), in the directions of VMamba's SS2D (2401.10166), which VL-Mamba (2403.13600)
puts between its image encoder and its language model; one direction over a sequence is Mamba's own scan. Directions
are orders in which one and the same u is read and its result is written: nothing is copied to be scanned.
Dims: B images, L = height width tokens, K directions, D channels, G groups of channels, S state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check

# a direction's letter: does it run down the columns, does it run backwards
ORDERS = {"r": (False, False), "c": (True, False), "R": (False, True), "C": (True, True)}
FINE = 8  # chunks are multiples of it


def forward(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | None = None,
    height: int = 0,
    width: int = 0,
    scan: str = "r",
    softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = SiLU(z) sum over k of (c_k h_k + d_k u),   h_k[t] = exp(dt_k a_k) h_k[t - 1] + dt_k b_k u,
    dt_k = softplus(delta_k + delta_bias_k), each direction k over the tokens in its own order.

    Args:
        u: (B, L, D), L row-major tokens of a grid, in any strides: the transpose of a (B, D, L) sequence serves too.
        delta: (B, L, K, D), of every token in its own place, whatever the direction; (B, L, D) where K is 1.
        a: (K D, S), what upstream writes -exp(A_log); rows ordered (direction, channel), as d's and delta_bias's.
        b, c: (B, L, K, G, S), group g being that of the channels from g D / G on; (B, L, K, S) for one group; (B, L, S)
            where K is 1 as well.
        d: (K D), the skip. delta_bias: (K D).
        z: (B, L, D), a gate on the sum.
        state: (B, K, D, S), each direction's h before its first token; zeros by default.
        height, width: of the grid, their product L; by default (0, 0) an L x 1 one.
        scan: one letter a direction, one, two or four of them. "r" row by row, "c" column by column, "R" and "C" the
            same from the last token to the first. Mamba is "r"; VMamba's v0 and v05 (CSM) "rcRC", v052d (BSM) "rrRR".
        softplus: whether dt is the softplus of delta + delta_bias or that sum itself.

    Tensors are of any floating dtype each. Returns: y (B, L, D) in u's dtype, and the last state (B, K, D, S), float32.
    All is computed in float32 (float64 where a tensor is float64), states included, and y is rounded once; autocast
    does not change it. b is discretised to first order (dt b), a exactly.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    wide = _wide(u, delta, a, b, c, d, z, delta_bias, state)
    B, L, D = u.shape
    K, G, S = b.shape[2:]
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias.to(wide).view(K, D)
    dt = F.softplus(dt) if softplus else dt
    decay = a.to(wide).view(K, D, S)
    b, c = b.to(wide), c.to(wide)
    order = token_order(scan, height, width, L, u.device)
    k = torch.arange(K, device=u.device)
    h = x.new_zeros(B, K, D, S) if state is None else state.to(wide)
    steps = []
    for p in order.unbind(1):
        # (B, K, D), and per channel (B, K, D, S)
        x_t, dt_t = x[:, p], dt[:, p, k]
        b_t, c_t = (t[:, p, k].repeat_interleave(D // G, 2) for t in (b, c))
        h = torch.exp(dt_t[..., None] * decay) * h + (dt_t * x_t)[..., None] * b_t
        steps.append((h * c_t).sum(-1))
    # step t of direction k stands where its order says
    place = order.argsort(1)
    y = torch.stack(steps, 1)[:, place.t(), k].sum(2)
    if d is not None:
        y = y + d.to(wide).view(K, D).sum(0) * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype).contiguous(), h


def shapes(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus) -> tuple[Tensor, Tensor]:
    """What forward returns, without its L steps."""
    last = (u.shape[0], len(scan), u.shape[2], a.shape[1])
    wide = _wide(u, delta, a, b, c, d, z, delta_bias, state)
    return u.new_empty(u.shape), u.new_empty(last, dtype=wide)


def token_order(scan: str, height: int, width: int, length: int, device=None) -> Tensor:
    """(K, L): the token that direction k reads at step t."""
    tokens = torch.arange(length, device=device)
    by_column = tokens.view(height or length, width or 1).t().flatten()
    orders = [by_column if column else tokens for column, _ in (ORDERS[letter] for letter in scan)]
    return torch.stack([o.flip(0) if ORDERS[letter][1] else o for o, letter in zip(orders, scan, strict=True)])


def chunk_length(length: int) -> int:
    """Tokens between two states that are kept for backward.

    Backward holds states inside of one chunk besides; 4 sqrt(L) keeps the two within an order of magnitude.
    """
    return FINE * max(1, -(-math.isqrt(16 * int(length)) // FINE))


def residuals(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: each direction's state before every chunk but the first."""
    (B, L, D), S = u.shape, a.shape[1]
    between = -(-L // chunk_length(L)) - 1
    return (u.new_empty((B, len(scan), between, S, D), dtype=torch.float32),)


def check(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"u": u, "delta": delta, "a": a, "b": b, "c": c, "d": d, "z": z, "delta_bias": delta_bias, "state": state}
    for name in ("u", "delta", "a", "b", "c"):
        if tensors[name] is None:
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if not isinstance(scan, str) or len(scan) not in (1, 2, 4) or not set(scan) <= set(ORDERS):
        raise ValueError(f"scan is {scan!r}; accepted: one, two or four of the letters r, c, R, C")
    if u.dim() != 3 or u.shape[1] == 0 or u.shape[2] == 0:
        raise ValueError(f"u has shape {tuple(u.shape)}; accepted: (B, L, D), L and D > 0")
    (B, L, D), K = u.shape, len(scan)
    if (height, width) == (0, 0):
        height, width = L, 1
    if height < 1 or width < 1 or height * width != L:
        raise ValueError(
            f"height and width are {height} and {width}; accepted: 1 or more each, of product L = {L}, or neither given"
        )
    if K == 1:
        delta = delta.unsqueeze(2) if delta.dim() == 3 else delta
        b, c = (t.unsqueeze(2) if t.dim() == 3 else t for t in (b, c))
    b, c = (t.unsqueeze(3) if t.dim() == 4 else t for t in (b, c))
    _check.shape("delta", delta, (B, L, K, D), "(B, L, K, D), K directions")
    if a.dim() != 2 or a.shape[0] != K * D or a.shape[1] == 0:
        raise ValueError(f"a has shape {tuple(a.shape)}; accepted: (K D, S) = ({K * D}, S), S > 0, K directions")
    S = a.shape[1]
    if b.dim() != 5 or b.shape[3] == 0 or D % b.shape[3]:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; accepted: (B, L, K, G, S), G a divisor of the {D} channels, or (B, L, K, S)"
        )
    G = b.shape[3]
    _check.shape("b", b, (B, L, K, G, S), "(B, L, K, G, S)")
    _check.shape("c", c, (B, L, K, G, S), "(B, L, K, G, S), the shape of b")
    _check.shape("d", d, (K * D,), "(K D,)")
    _check.shape("delta_bias", delta_bias, (K * D,), "(K D,)")
    _check.shape("z", z, (B, L, D), "(B, L, D)")
    _check.shape("state", state, (B, K, D, S), "(B, K, D, S)")
    return u, delta, a, b, c, d, z, delta_bias, state, int(height), int(width), scan, bool(softplus)


def draw(*values) -> tuple:
    """Nothing random."""
    return values


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where a tensor is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
