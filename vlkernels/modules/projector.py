"""Dense projectors of two or more linears: the activation between them, and a norm or shuffle before, run fused.

`mlp_projector` computes [pixel shuffle] -> [norm] -> linear -> activation -> linear. Where a child is no plain
nn.Linear any more (a LoRA on it, hooks, a sharded or quantised weight), the same equation runs through the children.
Projectors of one linear are in `linear_projector.py`.

All take `device`, `dtype`, and `level`: 0 keeps the first product for backward, 1 recomputes it. x has the parameters'
dtype (float16, bfloat16, float32; float64 on the reference), or any under autocast. Errors are ValueError or TypeError
and name the argument, what it got and what is accepted.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import ACTS, shuffled
from ..ops.mlp_projector import mlp_projector
from ._children import child_problem

# transformers' names of activations that we have under another name
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
_LLAVA_TYPES = "linear, identity, mlp{k}x_gelu, mlp{k}x_res{r}x_gelu with k >= 1 (the type pooler is LlavaPooler)"


class LlavaProjector(nn.Module):
    """LLaVA's `mm_projector`, with its parameter names: x (..., C) -> (..., N), C = mm_hidden_size, N = hidden_size.

        linear                  y = x Wᵀ + b                                      weight, bias
        mlp{k}x_gelu            k linears with GELU (erf) between them            0.weight, 0.bias, 2.weight, ...
        mlp{k}x_res{r}x_gelu    then r times: z = LN(y), y = z + L2(GELU(L1(z)))  {i}.pre_norm, {i}.proj.0, {i}.proj.2
        identity                y = x                                             none

    The skip adds the normalised z. i runs from 2k - 1. Initialised as nn.Linear, nn.LayerNorm (eps 1e-5).

    Source: haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT, multimodal_projector/builder.py; arXiv 2304.08485, 2310.03744.
    """

    def __init__(
        self, mm_projector_type: str, mm_hidden_size: int, hidden_size: int, *, level: int = 0, device=None, dtype=None
    ):
        super().__init__()
        self.mm_projector_type, self.level = mm_projector_type, level
        self.mm_hidden_size, self.hidden_size = mm_hidden_size, hidden_size
        self.linears, self.blocks = llava_layers(mm_projector_type)
        made = {"device": device, "dtype": dtype}
        if mm_projector_type == "linear":
            layer = nn.Linear(mm_hidden_size, hidden_size, **made)
            self.weight, self.bias = layer.weight, layer.bias
        for i in range(self.linears):
            self.add_module(str(2 * i), nn.Linear(hidden_size if i else mm_hidden_size, hidden_size, **made))
        for i in range(self.blocks):
            self.add_module(str(2 * self.linears - 1 + i), _ResidualBlock(hidden_size, **made))

    def forward(self, x: Tensor) -> Tensor:
        if self.mm_projector_type == "identity":
            return x
        check_channels("x", x, self.mm_hidden_size)
        if self.mm_projector_type == "linear":
            return F.linear(x, self.weight, self.bias)  # nothing to fuse
        layers = [getattr(self, str(2 * i)) for i in range(self.linears)]
        # pairs of linears run as one op, an odd one at the end alone
        for i in range(0, self.linears, 2):
            x = F.gelu(x) if i else x
            pair = layers[i : i + 2]
            x = pair[0](x) if len(pair) == 1 else _mlp(x, *pair, "gelu", self.level)
        for i in range(self.blocks):
            x = getattr(self, str(2 * self.linears - 1 + i))(x, self.level)
        return x

    def extra_repr(self) -> str:
        return f"{self.mm_projector_type}, {self.mm_hidden_size} -> {self.hidden_size}"


def llava_layers(mm_projector_type: str) -> tuple[int, int]:
    """(linears of the MLP, residual blocks) of a projector type; linear and identity have neither."""
    if mm_projector_type in ("linear", "identity"):
        return 0, 0
    match = re.fullmatch(r"mlp(\d+)x(?:_res(\d+)x)?_gelu", str(mm_projector_type))
    if match is None or int(match[1]) < 1:
        raise ValueError(f"mm_projector_type is {mm_projector_type!r}; accepted: {_LLAVA_TYPES}")
    return int(match[1]), int(match[2] or 0)


class _ResidualBlock(nn.Module):
    """z = LN(x); y = z + L2(GELU(L1(z))). The norm stays outside of the op, for the skip needs z."""

    def __init__(self, channels: int, **made):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels, **made)
        first, second = nn.Linear(channels, channels, **made), nn.Linear(channels, channels, **made)
        self.proj = nn.Sequential(first, nn.GELU(), second)

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        z = self.pre_norm(x)
        return z + _mlp(z, self.proj[0], self.proj[2], "gelu", level)


class MLPProjector(nn.Module):
    """y = linear_2(act(linear_1(x))): x (..., C f) -> (..., N), as transformers' LlavaMultiModalProjector.

    C = vision_hidden_size, N = text_hidden_size, f = n_feature_layers: that many vision layers, concatenated on the
    channels by the caller. Parameters `linear_1.weight` (N, C f), `linear_2.weight` (N, N), and biases with `bias`.

    act: "gelu" (erf), "gelu_tanh", "silu", "relu", "quick_gelu", or transformers' name of one of them.
    Initialised as nn.Linear. Source: transformers models/llava/modeling_llava.py.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        *,
        n_feature_layers: int = 1,
        bias: bool = True,
        act: str = "gelu",
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.act, self.level = _ALIASES.get(act, act), level
        if self.act not in ACTS:
            raise ValueError(f"act is {act!r}; accepted: {', '.join((*ACTS, *_ALIASES))}")
        self.in_features = vision_hidden_size * n_feature_layers
        self.linear_1 = nn.Linear(self.in_features, text_hidden_size, bias=bias, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.in_features)
        return _mlp(x, self.linear_1, self.linear_2, self.act, self.level)


class LlavaPooler(nn.Module):
    """y = proj(GELU(conv_pool(x))), conv_pool 2x2 with stride 2: x (B, h w, C) -> (B, (h // 2) (w // 2), N).

    x is row-major over `grid` = (h, w), or h for a square one; odd grids lose their last row or column. Parameters
    `conv_pool.weight` (N, C, 2, 2), `conv_pool.bias`, `proj.weight` (N, N), `proj.bias`, initialised as nn.Conv2d and
    nn.Linear. Source: LLaVA-VL/LLaVA-NeXT multimodal_projector/pooler_projector.py.
    """

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        grid: int | tuple[int, int],
        *,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(self.grid) != 2 or min(self.grid) < 2:
            raise ValueError(f"grid is {grid!r}; accepted: (h, w) or one side, at least 2")
        self.mm_hidden_size, self.level = mm_hidden_size, level
        self.conv_pool = nn.Conv2d(mm_hidden_size, hidden_size, 2, stride=2, device=device, dtype=dtype)
        self.proj = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.grid
        if x.dim() != 3 or x.shape[1] != h * w:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, N, C) with N = {h} x {w} = {h * w} tokens")
        check_channels("x", x, self.mm_hidden_size)
        x = x.unflatten(1, (h, w))
        if not (_plain(self.conv_pool, nn.Conv2d) and _plain(self.proj)):
            return self.proj(F.gelu(self.conv_pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)))
        # the convolution is a linear over the shuffled channels (dy, dx, c); its weight (N, C, 2, 2) is copied
        # into that order once a call, as many bytes as 4 C tokens of y hold
        weight = self.conv_pool.weight.permute(0, 2, 3, 1).flatten(1)
        x = x[:, : h // 2 * 2, : w // 2 * 2]
        return mlp_projector(
            x, weight, self.proj.weight, self.conv_pool.bias, self.proj.bias, shuffle=2, level=self.level
        )


class PixelShuffleProjector(nn.Module):
    """y = linear_2(GELU(linear_1(LN(shuffle(x))))), InternVL's `mlp1` with the pixel shuffle before it.

    x (B, h w, C) with a square grid, or (B, h, w, C), without CLS -> (B, h w / s², N); s = 1 / downsample_ratio. Each
    s x s neighbourhood becomes one token with channels in the order (row, column, channel). ps_version "v2" keeps the
    tokens row-major, "v1" leaves their grid transposed. C = vit_hidden_size, N = llm_hidden_size.

    Parameters `layer_norm` (C s²; eps), `linear_1.weight` (N, C s²), `linear_2.weight` (N, N) and their biases, as
    transformers names them; initialised as nn.LayerNorm and nn.Linear.
    Source: OpenGVLab/InternVL modeling_internvl_chat.py; arXiv 2404.16821.
    """

    def __init__(
        self,
        vit_hidden_size: int,
        llm_hidden_size: int,
        *,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        eps: float = 1e-5,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.shuffle = round(1 / downsample_ratio) if 0 < downsample_ratio <= 1 else 0
        if self.shuffle < 1 or abs(self.shuffle * downsample_ratio - 1) > 1e-6:
            raise ValueError(f"downsample_ratio is {downsample_ratio!r}; accepted: 1 / s for a whole s (0.5 for s = 2)")
        if ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version is {ps_version!r}; accepted: v1, v2")
        self.vit_hidden_size, self.ps_version, self.level = vit_hidden_size, ps_version, level
        channels = vit_hidden_size * self.shuffle**2
        self.layer_norm = nn.LayerNorm(channels, eps=eps, device=device, dtype=dtype)
        self.linear_1 = nn.Linear(channels, llm_hidden_size, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(llm_hidden_size, llm_hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.vit_hidden_size)
        s = self.shuffle
        if x.dim() == 3:
            side = math.isqrt(x.shape[1])
            if side * side != x.shape[1]:
                raise ValueError(f"x has {x.shape[1]} tokens; accepted: a square grid (no CLS), or x (B, h, w, C)")
            x = x.unflatten(1, (side, side))
        if x.dim() != 4 or x.shape[1] % s or x.shape[2] % s:
            raise ValueError(f"x is a grid of shape {tuple(x.shape)}; accepted: (B, h, w, C), h and w multiples of {s}")
        B, h, w, _ = x.shape
        y = _mlp(x, self.linear_1, self.linear_2, "gelu", self.level, norm=self.layer_norm, shuffle=s)
        if self.ps_version == "v1":
            # on y, after the op: swapping rows and columns of x would swap them within a neighbourhood too
            y = y.view(B, h // s, w // s, y.shape[-1]).transpose(1, 2)
        return y.reshape(B, h * w // (s * s), y.shape[-1])

    def extra_repr(self) -> str:
        return f"shuffle={self.shuffle}, ps_version={self.ps_version}"


class CogVLMGLU(nn.Module):
    """z = GELU(LN(x Wᵀ)); y = (SiLU(z W_gateᵀ) * z W_upᵀ) W_downᵀ, all without biases: x (..., C) -> (..., N).

    C = in_features, N = hidden_size, F = inner_hidden_size. Parameters as upstream's: `linear_proj.weight` (N, C),
    `norm1` (N; eps 1e-5), `gate_proj.weight` (F, N), `dense_h_to_4h.weight` (F, N; W_up), `dense_4h_to_h.weight`
    (N, F).
    With `image_tokens` x is (B, T, C) and y (B, T + 2, N): the learned `boi` and `eoi` (1, 1, N) stand around it.
    Initialised as nn.Linear and nn.LayerNorm, boi and eoi zero.
    Source: THUDM/CogVLM utils/models/cogvlm_model.py; arXiv 2311.03079.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        inner_hidden_size: int,
        *,
        image_tokens: bool = False,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.in_features, self.level = in_features, level
        self.linear_proj = nn.Linear(in_features, hidden_size, bias=False, **made)
        self.norm1 = nn.LayerNorm(hidden_size, **made)
        self.gate_proj = nn.Linear(hidden_size, inner_hidden_size, bias=False, **made)
        self.dense_h_to_4h = nn.Linear(hidden_size, inner_hidden_size, bias=False, **made)
        self.dense_4h_to_h = nn.Linear(inner_hidden_size, hidden_size, bias=False, **made)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden_size, **made)) if image_tokens else None
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden_size, **made)) if image_tokens else None

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.in_features)
        if self.boi is not None and x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted with image_tokens: (B, T, C)")
        y = self._fused(self.linear_proj(x))
        if self.boi is None:
            return y
        boi, eoi = (t.to(y.dtype).expand(y.shape[0], -1, -1) for t in (self.boi, self.eoi))
        return torch.cat((boi, y, eoi), 1)

    def _fused(self, x: Tensor) -> Tensor:
        """Norm, GELU and SwiGLU by the op where the children are plain, else by calling them."""
        norm, up, gate, down = self.norm1, self.dense_h_to_4h, self.gate_proj, self.dense_4h_to_h
        if not (_plain(norm, nn.LayerNorm) and _plain(up) and _plain(gate) and _plain(down)):
            z = F.gelu(norm(x))
            return down(F.silu(gate(z)) * up(z))
        return mlp_projector(
            x, up.weight, down.weight, wg=gate.weight, act="silu", level=self.level, norm="layer", norm_act="gelu",
            norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
        )  # fmt: skip


class AdapterMLP(nn.Module):
    """y = scale * linear_2(SiLU(linear_1(x))): x (..., C) -> (..., N), inner width r; LaVIN's and MemVP's projector.

    C = in_features, r = hidden_dim, N = out_features. Parameters `linear_1.weight` (r, C), `linear_2.weight` (N, r) and
    biases; Xavier-uniform weights, zero biases.

    Args:
        scale: 1 for LaVIN; MemVP multiplies by 0.01.
        rows: x is (B, T, C) and y (B, rows, N), zero from token T on (MemVP: 320 for 7B, 400 for 13B).

    forward's `indicator` (B,) multiplies each sample of x (B, T, C): 1 with an image, 0 without.

    Source: luogen1996/LaVIN lavin/model.py (arXiv 2305.15023); JieShibo/MemVP memvp/model.py (arXiv 2405.05615).
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        out_features: int,
        *,
        scale: float = 1.0,
        rows: int | None = None,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.scale, self.rows, self.level = in_features, scale, rows, level
        self.linear_1 = nn.Linear(in_features, hidden_dim, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_dim, out_features, device=device, dtype=dtype)
        for layer in (self.linear_1, self.linear_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, indicator: Tensor | None = None) -> Tensor:
        check_channels("x", x, self.in_features)
        if (self.rows is not None or indicator is not None) and x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted with rows or an indicator: (B, T, C)")
        if self.rows is not None and x.shape[1] > self.rows:
            raise ValueError(f"x has {x.shape[1]} tokens; accepted with rows={self.rows}: at most that many")
        if indicator is not None and tuple(indicator.shape) != (x.shape[0],):
            raise ValueError(f"indicator has shape {tuple(indicator.shape)}; accepted: (B,) = ({x.shape[0]},)")
        y = _mlp(x, self.linear_1, self.linear_2, "silu", self.level)
        if indicator is not None:
            y = y * (self.scale * indicator).to(y.dtype)[:, None, None]
        elif self.scale != 1.0:
            y = y * self.scale
        return y if self.rows is None else F.pad(y, (0, 0, 0, self.rows - y.shape[1]))

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, rows={self.rows}"


# -- shared --------------------------------------------------------------------------------------------------------


def check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.dim() < 1 or x.shape[-1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: {channels} channels in the last dimension")


def _mlp(
    x: Tensor,
    first: nn.Linear,
    second: nn.Linear,
    act: str,
    level: int,
    norm: nn.LayerNorm | None = None,
    shuffle: int = 1,
) -> Tensor:
    """second(act(first(norm(shuffle(x))))) by the op where the children are plain, else by calling them."""
    if not (_plain(first) and _plain(second) and (norm is None or _plain(norm, nn.LayerNorm))):
        x = shuffled(x, shuffle)
        return second(ACTS[act](first(x if norm is None else norm(x))))
    options = {}
    if norm is not None:
        options = {"norm": "layer", "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    return mlp_projector(
        x, first.weight, second.weight, first.bias, second.bias, act=act, shuffle=shuffle, level=level, **options
    )


def _plain(child: nn.Module, kind: type = nn.Linear) -> bool:
    """The op may read the child's parameters itself."""
    return child_problem("child", child, (kind,)) is None
