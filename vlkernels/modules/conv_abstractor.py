"""Convolutional abstractors: Honeybee's C-Abstractor and MobileVLM's LDP and LDPv2, on tokens as the tower gives them.

Maps stay token-major, (B, h w, C): nothing is permuted to channels first and back. The depthwise convolution with its
norm, activation, squeeze-excitation and the product after it are `conv_se_linear`; LDPv2 pools before its second linear
(`pooled_mlp`). Where a child is no plain layer any more (a LoRA on it, hooks, a subclass), the same equation runs
through the children.

Parameter names are upstream's, so that a checkpoint's keys below its prefix load as they are. `from_plain` takes
upstream's own module and shares its parameters. All take `device`, `dtype`, and `level`: 0 keeps for backward what the
products and convolutions gave, 1 computes it again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._conv import ACTS, channels_first, tokens
from ..ops._shuffle import ACTS as MLP_ACTS
from ..ops.conv_se_linear import conv_se_linear
from ..ops.conv_se_linear.reference import GATES
from ..ops.depthwise_conv_norm_act import depthwise_conv_norm_act
from ..ops.pooled_mlp import pooled_mlp
from ._children import child_problem
from ._parts import check_level, check_tokens
from .projector import LlavaProjector, _mlp


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: x (B, N, C), a square grid without CLS, -> (B, M + num_eos_tokens, D_t).

        x = [LN(x)] [+ pos_emb];  stage 1;  average pooling to sqrt(M) x sqrt(M);  stage 2;  readout;  [eos_tokens]

    A stage is `depth` bottlenecks: y = SiLU(LN(Conv1x1 x)); y = SiLU(LN(DWConv3x3 y)); y = y sigmoid(fc2 SiLU(fc1
    mean y)); out = SiLU(LN(Conv1x1 y) + shortcut), shortcut x itself, or LN(Conv1x1 x) where widths differ. readout is
    `mlp_depth` linears with SiLU between them. depth 0: only the pooling, and the readout from C. x itself is left as
    it is. C = encoder_hidden_size, D_t = output_hidden_size, M = num_query_tokens.

    Parameters: `pos_emb` (1, N, C), `prenorm` (eps 1e-6), `net.{0|2}.b{k}.conv{1,2,3}.{conv,bn}`, `.se.fc{1,2}`,
    `.downsample.{conv,bn}`, `readout.{0,2,..}`, `eos_tokens` (1, n, D_t). Weights N(0, 0.02), zero biases, tokens and
    positions truncated normal 0.02. A checkpoint's `pos_emb` with one row more loses its first, that of CLS.
    Source: khanrc/honeybee honeybee/projectors/projectors.py, with timm's RegStage; arXiv 2312.06742.
    """

    def __init__(
        self,
        num_input_tokens: int,
        encoder_hidden_size: int,
        output_hidden_size: int,
        hidden_size: int = 1024,
        *,
        depth: int = 3,
        mlp_depth: int = 2,
        num_query_tokens: int = 144,
        pos_emb: bool = True,
        prenorm: bool = False,
        num_eos_tokens: int = 0,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if depth < 0 or mlp_depth < 1 or num_eos_tokens < 0:
            raise ValueError(
                f"depth is {depth}, mlp_depth {mlp_depth}, num_eos_tokens {num_eos_tokens}; accepted: 0 or more, 1 or "
                "more, 0 or more"
            )
        self.side = square_side("num_query_tokens", num_query_tokens)
        square_side("num_input_tokens", num_input_tokens)
        self.encoder_hidden_size, self.level = encoder_hidden_size, check_level(level)
        self.pos_emb = None
        if pos_emb:
            self.pos_emb = nn.Parameter(torch.empty(1, num_input_tokens, encoder_hidden_size, **made))
        self.prenorm = nn.LayerNorm(encoder_hidden_size, eps=1e-6, **made) if prenorm else None
        if depth:
            stages = [
                nn.Sequential(), nn.AdaptiveAvgPool2d((self.side, self.side)), nn.Sequential()
            ]  # fmt: skip
            for i, width in ((0, encoder_hidden_size), (2, hidden_size)):
                for k in range(depth):
                    block = Bottleneck(hidden_size if k else width, hidden_size, **made)
                    stages[i].add_module(f"b{k + 1}", block)
            self.net = nn.Sequential(*stages)
        else:
            self.net = nn.AdaptiveAvgPool2d((self.side, self.side))
        layers: list[nn.Module] = [nn.Linear(hidden_size if depth else encoder_hidden_size, output_hidden_size, **made)]
        for _ in range(mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(output_hidden_size, output_hidden_size, **made)]
        self.readout = nn.Sequential(*layers)
        self.eos_tokens = None
        if num_eos_tokens:
            self.eos_tokens = nn.Parameter(torch.empty(1, num_eos_tokens, output_hidden_size, **made))
        self.reset_parameters()

    @classmethod
    def from_plain(cls, plain: nn.Module, num_query_tokens: int, *, level: int = 0) -> CAbstractor:
        """Upstream's module with its parameters shared, not copied; its state dict does not say num_query_tokens."""
        state = plain.state_dict(keep_vars=True)
        depth = sum(f"net.0.b{k}.conv1.conv.weight" in state for k in range(1, len(state)))
        readout = [name for name in state if name.startswith("readout.") and name.endswith(".weight")]
        first = state["readout.0.weight"]
        width = state["net.0.b1.conv1.conv.weight"].shape[1] if depth else first.shape[1]
        rows = state["pos_emb"].shape[1] if state.get("pos_emb") is not None else num_query_tokens
        eos = state.get("eos_tokens")
        module = cls(
            rows - (math.isqrt(rows) ** 2 != rows), width, first.shape[0], first.shape[1], depth=depth,
            mlp_depth=len(readout), num_query_tokens=num_query_tokens, pos_emb=state.get("pos_emb") is not None,
            prenorm="prenorm.weight" in state, num_eos_tokens=0 if eos is None else eos.shape[1], level=level,
            device="meta",
        )  # fmt: skip
        return _sharing(module, plain)

    def reset_parameters(self) -> None:
        for child in self.modules():
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(child.weight, std=0.02)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif isinstance(child, nn.LayerNorm):
                child.reset_parameters()
        for parameter in (self.pos_emb, self.eos_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.encoder_hidden_size)
        side = square_side("x's number of tokens", x.shape[1])
        if self.pos_emb is not None and x.shape[1] != self.pos_emb.shape[1]:
            raise ValueError(f"x has {x.shape[1]} tokens; accepted: the {self.pos_emb.shape[1]} rows of pos_emb")
        if self.prenorm is not None:
            x = self.prenorm(x)
        if self.pos_emb is not None:
            x = x + self.pos_emb
        if isinstance(self.net, nn.Sequential):
            x = self._stage(self.net[0], x, side)
            x = self._pooled(self.net[1], x, side)
            x = self._stage(self.net[2], x, self.side)
        else:
            x = self._pooled(self.net, x, side)
        layers = self.readout[::2]
        # pairs of linears run as one op, an odd one at the end alone
        for i in range(0, len(layers), 2):
            x = F.silu(x) if i else x
            pair = layers[i : i + 2]
            x = pair[0](x) if len(pair) == 1 else _mlp(x, *pair, "silu", self.level)
        if self.eos_tokens is None:
            return x
        return torch.cat((x, self.eos_tokens.expand(x.shape[0], -1, -1).to(x.dtype)), 1)

    def _stage(self, stage: nn.Sequential, x: Tensor, side: int) -> Tensor:
        for block in stage:
            x = block(x, side, side, self.level)
        return x

    def _pooled(self, pool: nn.Module, x: Tensor, side: int) -> Tensor:
        if child_problem("pool", pool, (nn.AdaptiveAvgPool2d,)) is not None:
            return _called(pool, x, side, side)
        return average_pool(x, side, side, self.side, self.side)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key, own = f"{prefix}pos_emb", self.pos_emb
        if own is not None and key in state_dict and state_dict[key].shape[1:2] == (own.shape[1] + 1,):
            state_dict[key] = state_dict[key][:, 1:]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ConvNorm(nn.Module):
    """A convolution and a norm over the channels, under timm's names."""

    def __init__(self, width: int, out: int, kernel: int = 1, groups: int = 1, **made):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=groups, bias=False, **made)
        self.bn = nn.LayerNorm(out, eps=1e-5, **made)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.bn(_called(self.conv, x, h, w))


class SqueezeExcite(nn.Module):
    """y gate(fc2 act(fc1 mean of y over the tokens)), y (B, N, C)."""

    def __init__(self, channels: int, squeezed: int, act: str, gate: str, **made):
        super().__init__()
        self.act, self.gate = act, gate
        self.fc1 = nn.Conv2d(channels, squeezed, 1, **made)
        self.fc2 = nn.Conv2d(squeezed, channels, 1, **made)

    def forward(self, y: Tensor) -> Tensor:
        means = y.mean(1)[:, :, None, None]
        return y * GATES[self.gate](self.fc2(ACTS[self.act](self.fc1(means))))[:, None, :, 0, 0]

    def parameters_of(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias


class Bottleneck(nn.Module):
    """timm's RegNet block with channel norms and SiLU; the excitation has round(C_in / 4) channels inside."""

    def __init__(self, width: int, hidden: int, **made):
        super().__init__()
        self.conv1 = ConvNorm(width, hidden, **made)
        self.conv2 = ConvNorm(hidden, hidden, 3, hidden, **made)
        self.se = SqueezeExcite(hidden, max(1, round(0.25 * width)), "silu", "sigmoid", **made)
        self.conv3 = ConvNorm(hidden, hidden, **made)
        self.downsample = ConvNorm(width, hidden, **made) if width != hidden else None

    def forward(self, x: Tensor, h: int, w: int, level: int = 0) -> Tensor:
        shortcut = x if self.downsample is None else self._shortcut(x, h, w)
        convs = [self.conv1, self.conv2, self.conv3]
        inside = [child for c in convs for child in (c.conv, c.bn)] + [self.se.fc1, self.se.fc2]
        if not (_plain(*inside) and _untouched(*convs, self.se) and len({c.bn.eps for c in convs}) == 1):
            y = F.silu(self.conv2(F.silu(self.conv1(x, h, w)), h, w))
            return F.silu(self.conv3(self.se(y), h, w) + shortcut)
        first, middle, last = (c.bn for c in convs)
        return conv_se_linear(
            F.linear(x, self.conv1.conv.weight.flatten(1)), self.conv2.conv.weight, *self.se.parameters_of(),
            self.conv3.conv.weight.flatten(1), h, w, middle.weight, middle.bias, last.weight, last.bias, first.weight,
            first.bias, shortcut, in_norm=True, act="silu", se_act="silu", gate="sigmoid", out_act="silu",
            eps=first.eps, level=level,
        )  # fmt: skip

    def _shortcut(self, x: Tensor, h: int, w: int) -> Tensor:
        down = self.downsample
        if not (_plain(down.conv, down.bn) and _untouched(down)):
            return down(x, h, w)
        return down.bn(F.linear(x, down.conv.weight.flatten(1)))


# -- MobileVLM -----------------------------------------------------------------------------------------------------


class LDPNetProjector(nn.Module):
    """MobileVLM's LDP: x (B, h h, C), a square grid without CLS, -> (B, ceil(h / 2)², D).

        y = L2(GELU(L1 x));  y = y + block(y);  y = block of stride 2 (y)
        block: Hardswish(LN(DWConv3x3 y)); y Hardsigmoid(fc2 ReLU(fc1 mean y)); LN(Conv1x1 y)

    C = mm_hidden_size, D = hidden_size. Parameters `model.mlp.{1,3}`, `model.mb_block.{1,2}.block.0.{0,1}`,
    `.block.1.fc{1,2}`, `.block.2.{0,1}`; initialised as nn.Linear, nn.Conv2d and nn.LayerNorm.
    Source: Meituan-AutoML/MobileVLM mobilevlm/model/vision_projector.py; arXiv 2312.16886.
    """

    def __init__(self, mm_hidden_size: int, hidden_size: int, *, level: int = 0, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.mm_hidden_size, self.level = mm_hidden_size, check_level(level)
        self.model = nn.Module()
        first, second = nn.Linear(mm_hidden_size, hidden_size, **made), nn.Linear(hidden_size, hidden_size, **made)
        self.model.mlp = nn.Sequential(nn.Identity(), first, nn.GELU(), second)
        blocks = (InvertedResidual(hidden_size, stride, **made) for stride in (1, 2))
        self.model.mb_block = nn.Sequential(nn.Identity(), *blocks)

    @classmethod
    def from_plain(cls, plain: nn.Module, *, level: int = 0) -> LDPNetProjector:
        """Upstream's module with its parameters shared, not copied."""
        hidden, width = plain.state_dict()["model.mlp.1.weight"].shape
        return _sharing(cls(width, hidden, level=level, device="meta"), plain)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.mm_hidden_size)
        side = square_side("x's number of tokens", x.shape[1])
        mlp = self.model.mlp
        x = _mlp(x, mlp[1], mlp[3], "gelu", self.level)
        for block in self.model.mb_block[1:]:
            x = block(x, side, side, self.level)
        return x


class InvertedResidual(nn.Module):
    """torchvision's MobileNetV3 block without expansion and with channel norms; stride 1 has a skip."""

    def __init__(self, channels: int, stride: int, **made):
        super().__init__()
        self.stride = stride
        conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False, **made)
        out = nn.Conv2d(channels, channels, 1, bias=False, **made)
        self.block = nn.Sequential(
            nn.Sequential(conv, nn.LayerNorm(channels, **made), nn.Hardswish()),
            SqueezeExcite(channels, squeezed_width(channels), "relu", "hardsigmoid", **made),
            nn.Sequential(out, nn.LayerNorm(channels, **made), nn.Identity()),
        )

    def forward(self, x: Tensor, h: int, w: int, level: int = 0) -> Tensor:
        (conv, norm, _), se, (out, out_norm, _) = self.block
        skip = self.stride == 1
        if not (_plain(conv, norm, out, out_norm, se.fc1, se.fc2) and _untouched(se, *self.block[::2], self.block)):
            y = se(F.hardswish(norm(_called(conv, x, h, w))))
            y = out_norm(out(y.transpose(1, 2)[..., None])[..., 0].transpose(1, 2))
            return x + y if skip else y
        if norm.eps != out_norm.eps:
            raise ValueError(f"the block's norms have eps {norm.eps} and {out_norm.eps}; accepted: the same")
        return conv_se_linear(
            x, conv.weight, *se.parameters_of(), out.weight.flatten(1), h, w, norm.weight, norm.bias, out_norm.weight,
            out_norm.bias, shortcut=x if skip else None, stride=self.stride, act="hardswish", se_act="relu",
            gate="hardsigmoid", eps=norm.eps, level=level,
        )  # fmt: skip


class LDPNetV2Projector(nn.Module):
    """MobileVLM V2's LDPv2: x (B, h h, C), a square grid without CLS, -> (B, 144, D).

        y = pool(L2(GELU(L1 x))) on 12 x 12, as adaptive average pooling;  y = DWConv3x3(y) + y

    Pooled before L2, which gives the same: a pooled token is an average. C = mm_hidden_size, D = hidden_size.
    Parameters `mlp.mlp.{0,2}`, `peg.peg.0`; initialised as nn.Linear and nn.Conv2d.
    Source: Meituan-AutoML/MobileVLM mobilevlm/model/vision_projector.py; arXiv 2402.03766.
    """

    SIDE = 12

    def __init__(self, mm_hidden_size: int, hidden_size: int, *, level: int = 0, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.mm_hidden_size, self.level = mm_hidden_size, check_level(level)
        self.mlp, self.peg = nn.Module(), nn.Module()
        first, second = nn.Linear(mm_hidden_size, hidden_size, **made), nn.Linear(hidden_size, hidden_size, **made)
        self.mlp.mlp = nn.Sequential(first, nn.GELU(), second)
        self.peg.peg = nn.Sequential(nn.Conv2d(hidden_size, hidden_size, 3, 1, 1, groups=hidden_size, **made))

    @classmethod
    def from_plain(cls, plain: nn.Module, *, level: int = 0) -> LDPNetV2Projector:
        """Upstream's module with its parameters shared, not copied."""
        hidden, width = plain.state_dict()["mlp.mlp.0.weight"].shape
        return _sharing(cls(width, hidden, level=level, device="meta"), plain)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.mm_hidden_size)
        side, out = square_side("x's number of tokens", x.shape[1]), self.SIDE
        (first, _, second), conv = self.mlp.mlp, self.peg.peg[0]
        if _plain(first, second):
            y = pooled_mlp(
                x, first.weight, second.weight, side, side, out, out, first.bias, second.bias, level=self.level
            )
        else:
            y = average_pool(second(MLP_ACTS["gelu"](first(x))), side, side, out, out)
        if not _plain(conv):
            return _called(conv, y, out, out) + y
        return depthwise_conv_norm_act(y, conv.weight, out, out, conv.bias, skip=True, norm="none")[0]


def mobilevlm_projector(mm_projector_type: str, mm_hidden_size: int, hidden_size: int, **options) -> nn.Module:
    """MobileVLM's projector of a type: "ldpnetv2..", "ldpnet..", else LlavaProjector's "linear" and "mlp{k}x_gelu"."""
    for start, kind in (("ldpnetv2", LDPNetV2Projector), ("ldpnet", LDPNetProjector)):
        if str(mm_projector_type).startswith(start):
            return kind(mm_hidden_size, hidden_size, **options)
    return LlavaProjector(mm_projector_type, mm_hidden_size, hidden_size, **options)


# -- shared --------------------------------------------------------------------------------------------------------


def squeezed_width(channels: int) -> int:
    """A quarter, rounded to a multiple of 8, not below 8 and not by more than a tenth."""
    quarter = channels // 4
    width = max(8, (quarter + 4) // 8 * 8)
    return width + 8 if width < 0.9 * quarter else width


def square_side(name: str, count: int) -> int:
    side = math.isqrt(max(0, count))
    if side < 1 or side * side != count:
        raise ValueError(f"{name} is {count}; accepted: a square, 1 or more")
    return side


def average_pool(x: Tensor, h: int, w: int, out_h: int, out_w: int) -> Tensor:
    """torch's adaptive average pooling of (B, h w, C) to (B, out_h out_w, C), which keeps nothing for backward."""
    if (h, w) == (out_h, out_w):
        return x
    if h % out_h == 0 and w % out_w == 0:
        return x.unflatten(1, (out_h, h // out_h, out_w, w // out_w)).mean((2, 4)).flatten(1, 2)
    B, C = x.shape[0], x.shape[2]
    rows, columns = _windows(x, h, out_h), _windows(x, w, out_w)
    y = torch.bmm(rows.expand(B, -1, -1), x.reshape(B, h, w * C)).view(B * out_h, w, C)
    y = torch.bmm(columns.expand(B * out_h, -1, -1), y).view(B, out_h, out_w, C)
    counts = rows.sum(-1)[:, None] * columns.sum(-1)
    return (y / counts[..., None]).flatten(1, 2)


def _windows(x: Tensor, side: int, out: int) -> Tensor:
    """(out, side): 1 where pooled row i averages the row."""
    i, row = torch.arange(out, device=x.device)[:, None], torch.arange(side, device=x.device)
    return ((row >= i * side // out) & (row * out < (i + 1) * side)).to(x.dtype)


def _called(conv: nn.Module, x: Tensor, h: int, w: int) -> Tensor:
    """A convolution that somebody hooked or replaced, called on (B, C, h, w)."""
    return tokens(conv(channels_first(x, h, w)))


def _plain(*children: nn.Module) -> bool:
    """The ops may read the children's parameters themselves."""
    return all(child_problem("child", child, (nn.Linear, nn.LayerNorm, nn.Conv2d)) is None for child in children)


def _untouched(*children: nn.Module) -> bool:
    """The modules between are of our own kinds and carry no hooks."""
    return all(child_problem("child", child, (ConvNorm, SqueezeExcite, nn.Sequential)) is None for child in children)


def _sharing(module: nn.Module, plain: nn.Module) -> nn.Module:
    module.load_state_dict(plain.state_dict(keep_vars=True), strict=True, assign=True)
    return module.train(plain.training)
