"""Selective-scan blocks: VMamba's SS2D over an image, Mamba's layer over a sequence, and VL-Mamba's connectors on SS2D.

Maps of tokens stay (B, tokens, channels) from the first linear to the last: convolutions see channels-last views, and
the scan reads one map in every direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_projector import linear_projector
from ..ops.mlp_projector import mlp_projector
from ..ops.selective_scan_2d import selective_scan_2d
from ._children import child_problem
from ._parts import check_tokens, norm_options, plain
from .mapper import check_positive
from .projector import check_channels

# VMamba's forward_type -> the directions of its four parameter sets
SCANS = {"v0": "rcRC", "v05": "rcRC", "v052d": "rrRR"}


class SS2D(nn.Module):
    """VMamba's two-dimensional selective scan: x (B, h, w, d) -> (B, h, w, d), any h and w.

        [u | z] = x W_inᵀ;   u = SiLU(DWConv3x3(u));   [dt_low_k | b_k | c_k] = u W_x,kᵀ;   delta_k = dt_low_k W_dt,kᵀ
        y = (LN(sum over k of scan_k(u, delta_k + bias_k, -exp(A_logs_k), b_k, c_k, Ds_k)) * SiLU(z)) W_outᵀ

    over E = ssm_ratio d channels and K = 4 directions: forward_type "v0" and "v05" rows and columns both ways (CSM),
    "v052d" rows forwards and backwards, each with two parameter sets (BSM). The scan is vlkernels.selective_scan_2d.

    Parameters, with upstream's names: `in_proj.weight` (2 E, d), `conv2d.weight` (E, 1, 3, 3), `conv2d.bias`,
    `x_proj_weight` (4, R + 2 S, E), `dt_projs_weight` (4, E, R), `dt_projs_bias` (4, E), `A_logs` (4 E, S), `Ds` (4 E),
    `out_norm` (eps 1e-5), `out_proj.weight` (d, E); R is dt_rank, ceil(d / 16) by default, S d_state.
    Initialised as upstream: dt_projs_weight uniform within R^-1/2, dt_projs_bias so that its softplus is log-uniform in
    [dt_min, dt_max], A_logs = ln(1..S), Ds 1, the rest torch's defaults.

    Source: MzeroMiko/VMamba classification/models/vmamba.py; arXiv 2401.10166.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        forward_type: str = "v05",
        *,
        d_conv: int = 3,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if forward_type not in SCANS:
            raise ValueError(f"forward_type is {forward_type!r}; accepted: {', '.join(SCANS)}")
        E, R = int(ssm_ratio * d_model), math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_positive(d_model=d_model, d_state=d_state, dt_rank=R, **{"ssm_ratio * d_model": E})
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}; accepted: an odd number")
        made, self.forward_type = {"device": device, "dtype": dtype}, forward_type
        self.scan, self.dt_rank, self.d_state = SCANS[forward_type], R, d_state
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        K = len(self.scan)
        self.in_proj = nn.Linear(d_model, 2 * E, bias=False, **made)
        self.conv2d = nn.Conv2d(E, E, d_conv, padding=d_conv // 2, groups=E, **made)
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * d_state, E, **made))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, E, R, **made))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, E, **made))
        self.A_logs = nn.Parameter(torch.empty(K * E, d_state, **made))
        self.Ds = nn.Parameter(torch.empty(K * E, **made))
        self.out_norm = nn.LayerNorm(E, **made)
        self.out_proj = nn.Linear(E, d_model, bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the class's docstring."""
        for child in (self.in_proj, self.conv2d, self.out_norm, self.out_proj):
            child.reset_parameters()
        for weight in self.x_proj_weight:  # each as nn.Linear's
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_projs_bias.copy_(_step_bias(self.dt_projs_bias, *self.dt_range))
        _reset_states(self.A_logs, self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or 0 in x.shape[1:3]:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, h, w, d), h and w > 0")
        check_channels("x", x, self.in_proj.in_features)
        (_, h, w, _), K, S, R = x.shape, len(self.scan), self.d_state, self.dt_rank
        u, z = _halves(x, self.in_proj)
        u = F.silu(_convolved(u, self.conv2d)).flatten(1, 2)  # (B, L, E)
        low, b, c = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (K, R + 2 * S)).split((R, S, S), -1)
        # (K, B L, R) (K, R, E), and a view (B, L, K, E) of the product
        delta = torch.bmm(low.flatten(0, 1).transpose(0, 1), self.dt_projs_weight.transpose(1, 2))
        delta = delta.unflatten(1, u.shape[:2]).permute(1, 2, 0, 3)
        y, _ = selective_scan_2d(
            u, delta, -torch.exp(self.A_logs.float()), b, c, self.Ds, delta_bias=self.dt_projs_bias.flatten(),
            height=h, width=w, scan=self.scan,
        )  # fmt: skip
        return self.out_proj(self.out_norm(y).unflatten(1, (h, w)) * F.silu(z))

    def extra_repr(self) -> str:
        return f"d_state={self.d_state}, dt_rank={self.dt_rank}, forward_type={self.forward_type!r}"


class MambaState(NamedTuple):
    """What a MambaLayer carries from token to token, as transformers' cache lays it out: conv (B, E, kernel), the last
    inputs of the convolution; ssm (B, E, S), float32."""

    conv: Tensor
    ssm: Tensor


class MambaLayer(nn.Module):
    """Mamba's layer: x (B, L, d) -> (B, L, d).

        [u | z] = x W_inᵀ;   u = SiLU(causal depthwise conv(u));   [dt_low | b | c] = u W_xᵀ
        y = (SiLU(z) scan(u, dt_low W_dtᵀ + bias, -exp(A_log), b, c, D)) W_outᵀ

    over E = expand d channels. `continued` carries a state on, a token or many at a time.

    Parameters, with transformers' names: `in_proj.weight` (2 E, d), `conv1d.weight` (E, 1, conv_kernel), `conv1d.bias`,
    `x_proj.weight` (R + 2 S, E), `dt_proj.weight` (E, R), `dt_proj.bias`, `A_log` (E, S), `D` (E), `out_proj.weight`;
    R is time_step_rank, ceil(d / 16) by default, S state_size. Initialised as SS2D, with the factor time_step_scale.

    Source: transformers models/mamba/modeling_mamba.py, MambaMixer; arXiv 2312.00752.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        time_step_rank: int | None = None,
        *,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        time_step_min: float = 1e-3,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
        time_step_scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        E, R = int(expand * hidden_size), math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        check_positive(
            hidden_size=hidden_size, state_size=state_size, conv_kernel=conv_kernel, time_step_rank=R, expand=E
        )
        made = {"device": device, "dtype": dtype}
        self.state_size, self.time_step_rank, self.time_step_scale = state_size, R, time_step_scale
        self.time_steps = (time_step_min, time_step_max, time_step_floor)
        self.in_proj = nn.Linear(hidden_size, 2 * E, bias=use_bias, **made)
        self.conv1d = nn.Conv1d(E, E, conv_kernel, padding=conv_kernel - 1, groups=E, bias=use_conv_bias, **made)
        self.x_proj = nn.Linear(E, R + 2 * state_size, bias=False, **made)
        self.dt_proj = nn.Linear(R, E, **made)
        self.A_log = nn.Parameter(torch.empty(E, state_size, **made))
        self.D = nn.Parameter(torch.empty(E, **made))
        self.out_proj = nn.Linear(E, hidden_size, bias=use_bias, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the class's docstring."""
        for child in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            child.reset_parameters()
        spread = self.time_step_scale * self.time_step_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        self.dt_proj.bias.copy_(_step_bias(self.dt_proj.bias, *self.time_steps))
        _reset_states(self.A_log, self.D)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """attention_mask (B, L): 0 where x is padding, which then leaves the states as they are but for their decay."""
        return self._run(x, None, attention_mask)[0]

    def continued(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """forward on the tokens that follow those of `state` (None: on the first ones), and the state after them."""
        y, u, last = self._run(x, state, None)
        kernel = self.conv1d.kernel_size[0]
        before = u.new_zeros(x.shape[0], kernel, u.shape[2]) if state is None else state.conv.transpose(1, 2).to(u)
        conv = torch.cat((before, u), 1)[:, -kernel:].transpose(1, 2).contiguous()
        return y, MambaState(conv, last)

    def _run(self, x: Tensor, state: MambaState | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, the convolution's inputs (B, L, E), the last state (B, E, S)."""
        check_tokens("x", x, self.in_proj.in_features)
        (B, L, _), E, S, kernel = x.shape, self.D.shape[0], self.state_size, self.conv1d.kernel_size[0]
        if L == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, L, d), L > 0")
        if state is not None:
            for name, t, shape in (("conv", state.conv, (B, E, kernel)), ("ssm", state.ssm, (B, E, S))):
                if tuple(t.shape) != shape:
                    raise ValueError(f"state.{name} has shape {tuple(t.shape)}; accepted: {shape}")
        if mask is not None:
            if tuple(mask.shape) != (B, L):
                raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; accepted: (B, L) = {(B, L)}")
            mask = mask[..., None].to(x.dtype)
            x = x * mask
        taken, z = _halves(x, self.in_proj)
        if state is None:
            u = _convolved(taken, self.conv1d)
        else:
            # the inputs before the first token, where a fresh sequence has zeros
            before = state.conv.transpose(1, 2)[:, 1:].to(taken)
            u = _convolved(torch.cat((before, taken), 1), self.conv1d)[:, kernel - 1 :]
        u = F.silu(u)
        u = u if mask is None else u * mask
        low, b, c = self.x_proj(u).split((self.time_step_rank, S, S), -1)
        # without dt_proj's bias, which the scan adds in float32
        delta = F.linear(low, self.dt_proj.weight)
        y, last = selective_scan_2d(
            u, delta, -torch.exp(self.A_log.float()), b, c, self.D, z, self.dt_proj.bias,
            None if state is None else state.ssm[:, None],
        )  # fmt: skip
        return self.out_proj(y), taken, last[:, 0]


class VLMambaMLP(nn.Module):
    """VL-Mamba's connector VSS-MLP: x (B, N, C) -> (B, N, W), P = mlp(norm(vss(x) + x)), mlp Linear, GELU, Linear.

    The paper gives no code: vss is an SS2D, norm a LayerNorm. scan: "csm" (four directions) or "bsm" (two). The tokens
    are the rows of a square grid unless forward is told its (height, width).
    Parameters `vss.*`, `norm`, `mlp.0`, `mlp.2`. Source: arXiv 2403.13600, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        out_features: int,
        d_state: int = 16,
        scan: str = "csm",
        *,
        ssm_ratio: float = 2.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.vss = SS2D(dim, d_state, ssm_ratio, forward_type=_forward_type(scan), **made)
        self.norm = nn.LayerNorm(dim, eps=eps, **made)
        self.mlp = nn.Sequential(
            nn.Linear(dim, out_features, **made), nn.GELU(), nn.Linear(out_features, out_features, **made)
        )

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        check_tokens("x", x, self.norm.normalized_shape[0])
        s = _scanned(x, self.vss, grid) + x
        first, act, second = self.mlp
        if (
            not plain(self.norm, first, second)
            or child_problem("act", act, (nn.GELU,))
            or child_problem("mlp", self.mlp, (nn.Sequential,))
        ):
            return self.mlp(self.norm(s))
        act = "gelu_tanh" if act.approximate == "tanh" else "gelu"
        weights = first.weight, second.weight, first.bias, second.bias
        return mlp_projector(s, *weights, act=act, **norm_options(self.norm))


class VLMambaL2(nn.Module):
    """VL-Mamba's connector VSS-L2, which its paper favours with scan "bsm": x (B, N, C) -> (B, N, W),

        Y = in_proj(x),   P = out_proj(norm(vss(GELU(Y)) + Y))

    with vss, norm, scan and grid as in VLMambaMLP, over dim channels.
    Parameters `in_proj`, `vss.*`, `norm`, `out_proj`. Source: arXiv 2403.13600, section 3.2.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        out_features: int,
        d_state: int = 16,
        scan: str = "bsm",
        *,
        ssm_ratio: float = 2.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(in_features, dim, **made)
        self.vss = SS2D(dim, d_state, ssm_ratio, forward_type=_forward_type(scan), **made)
        self.norm = nn.LayerNorm(dim, eps=eps, **made)
        self.out_proj = nn.Linear(dim, out_features, **made)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        check_tokens("x", x, self.in_proj.in_features)
        y = self.in_proj(x)
        s = _scanned(F.gelu(y), self.vss, grid) + y
        if not plain(self.norm, self.out_proj):
            return self.out_proj(self.norm(s))
        return linear_projector(s, self.out_proj.weight, self.out_proj.bias, **norm_options(self.norm))


def _forward_type(scan: str) -> str:
    if scan not in ("csm", "bsm"):
        raise ValueError(f"scan is {scan!r}; accepted: 'csm', 'bsm'")
    return "v05" if scan == "csm" else "v052d"


def _scanned(x: Tensor, vss: nn.Module, grid: tuple[int, int] | None) -> Tensor:
    """vss over the (B, N, C) tokens of a grid."""
    N = x.shape[1]
    if grid is None:
        grid = (math.isqrt(N), math.isqrt(N))
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != N:
        raise ValueError(
            f"x has {N} tokens; accepted: those of the grid {tuple(grid)}, a square one where none is given"
        )
    return vss(x.unflatten(1, grid)).flatten(1, 2)


def _halves(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """The two halves of linear(x), each a tensor of its own: a slice of both would be copied by the convolution."""
    if child_problem("in_proj", linear, (nn.Linear,)) is not None:
        return linear(x).chunk(2, -1)
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    first, second = (F.linear(x, w, bias) for w, bias in zip(linear.weight.chunk(2), biases, strict=True))
    return first, second


def _convolved(x: Tensor, conv: nn.Conv1d | nn.Conv2d) -> Tensor:
    """A depthwise convolution of (B, ..., C) as it lies in memory, a channels-last view; causal over one axis."""
    axes = conv.weight.dim() - 2
    if child_problem("conv", conv, (nn.Conv1d, nn.Conv2d)) is not None:
        y = conv(x.movedim(-1, 1))
        return (y[..., : x.shape[1]] if axes == 1 else y).movedim(1, -1)
    if axes == 2:
        return F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, padding=conv.padding, groups=x.shape[-1]).movedim(
            1, -1
        )
    # (B, C, L, 1): one axis has no channels-last format
    y = F.conv2d(
        x[:, :, None].movedim(-1, 1),
        conv.weight[..., None],
        conv.bias,
        padding=(conv.padding[0], 0),
        groups=x.shape[-1],
    )
    return y.movedim(1, -1)[:, : x.shape[1], 0]


def _step_bias(like: Tensor, low: float, high: float, floor: float) -> Tensor:
    """Numbers whose softplus is log-uniform in [low, high], and floor at least."""
    drawn = torch.rand(like.shape, dtype=torch.float32, device=like.device)
    dt = torch.exp(drawn * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def _reset_states(a_log: Tensor, d: Tensor) -> None:
    a_log.copy_(torch.arange(1, a_log.shape[1] + 1, dtype=torch.float32, device=a_log.device).log())
    nn.init.ones_(d)
