"""Mapping networks: an image embedding or its tokens become prefix embeddings of a language model.

ClipCap's MLP and transformer (arXiv 2111.09734), ESPER's MLP, MAPL's bottleneck transformer and Meta-Mapper. The
transformers' blocks run their norms inside the products, and the last block computes the returned rows only.

All take `device` and `dtype`; x has the parameters' dtype (float16, bfloat16, float32; float64 on the reference), or
any under autocast. level: of the blocks' MLPs, 0 keeps the first product for backward, 1 recomputes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ..ops.linear_projector import linear_projector
from ..ops.norm_residual import norm_residual
from ._block import SelfAttentionBlock, run, with_constants
from ._parts import check_tokens


class ClipCapMLP(nn.Module):
    """y = L_n(tanh(... tanh(L_1(x)))) as (B, p, D): x (B, C), C = prefix_size, p = prefix_length, D = embedding size.

    Hidden widths p D // 2; num_layers of them. There is nothing to fuse: torch keeps x and the tanh outputs only.

    Args:
        divided: x is divided by sqrt(p D / C) first, as ESPER does.
        normalize_prefix: x is divided by its L2 norm first, as ClipCap's training script does on demand.

    Parameters `model.0`, `model.2`, ... as upstream's below `clip_project.`; initialised as nn.Linear.
    Source: rmokady/CLIP_prefix_caption train.py; JiwanChung/esper train/code/clipcap.py (arXiv 2205.12630).
    """

    def __init__(
        self,
        prefix_size: int,
        embedding_size: int,
        prefix_length: int = 10,
        *,
        num_layers: int = 1,
        divided: bool = False,
        normalize_prefix: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive(prefix_size=prefix_size, embedding_size=embedding_size, prefix_length=prefix_length)
        if num_layers < 0:
            raise ValueError(f"num_layers is {num_layers}; accepted: 0 or more")
        self.prefix_size, self.prefix_length, self.normalize_prefix = prefix_size, prefix_length, normalize_prefix
        out = prefix_length * embedding_size
        self.divisor = math.sqrt(out / prefix_size) if divided else 1.0
        widths = [prefix_size, *[out // 2] * num_layers, out]
        layers: list[nn.Module] = []
        for width, then in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width, then, device=device, dtype=dtype), nn.Tanh()]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        check_vectors("x", x, self.prefix_size)
        x = x / x.norm(dim=-1, keepdim=True) if self.normalize_prefix else x
        x = x if self.divisor == 1.0 else x / self.divisor
        return self.model(x).unflatten(-1, (self.prefix_length, -1))

    def extra_repr(self) -> str:
        return f"prefix_length={self.prefix_length}, divisor={self.divisor:g}"


class ESPERMLP(ClipCapMLP):
    """ClipCapMLP with the input divided by sqrt(p D / C); Source: JiwanChung/esper train/code/clipcap.py."""

    def __init__(self, prefix_size: int, n_embd: int, prefix_length: int = 10, **options):
        super().__init__(prefix_size, n_embd, prefix_length, divided=True, **options)


class ClipCapTransformer(nn.Module):
    """The last p rows of blocks([linear(x) as c tokens; prefix_const]): x (B, C) -> (B, p, D).

    C = dim_clip, D = dim_embedding, p = prefix_length, c = clip_length. Pre-norm blocks (eps 1e-5) of full
    self-attention without query, key and value biases and a ReLU MLP of inner width int(D mlp_ratio); no final norm.
    normalize_prefix divides x by its L2 norm.

    Parameters `linear` (c D, C), `prefix_const` (p, D), N(0, 1), and those of `layers.{l}` as in SelfAttentionBlock,
    initialised as nn.Linear. Source: rmokady/CLIP_prefix_caption train.py; arXiv 2111.09734.
    """

    def __init__(
        self,
        dim_clip: int,
        dim_embedding: int,
        prefix_length: int = 10,
        clip_length: int = 10,
        num_layers: int = 8,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        normalize_prefix: bool = False,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive(dim_clip=dim_clip, prefix_length=prefix_length, clip_length=clip_length, num_layers=num_layers)
        made = {"device": device, "dtype": dtype}
        self.dim_clip, self.clip_length, self.normalize_prefix = dim_clip, clip_length, normalize_prefix
        self.prefix_length = prefix_length
        inner = int(dim_embedding * mlp_ratio)
        self.layers = nn.ModuleList(
            SelfAttentionBlock(
                dim_embedding, num_heads, inner, act="relu", packed=False, qkv_bias=False, level=level, **made
            )
            for _ in range(num_layers)
        )
        self.linear = nn.Linear(dim_clip, clip_length * dim_embedding, **made)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, dim_embedding, **made))

    def forward(self, x: Tensor) -> Tensor:
        check_vectors("x", x, self.dim_clip)
        x = x / x.norm(dim=-1, keepdim=True) if self.normalize_prefix else x
        tokens = self.linear(x).unflatten(-1, (self.clip_length, -1))
        return run(self.layers, with_constants(tokens, self.prefix_const), slice(self.clip_length, None))

    def extra_repr(self) -> str:
        return f"clip_length={self.clip_length}, prefix_length={self.prefix_length}"


class MAPLMapper(nn.Module):
    """up(the last M rows of blocks([down(x); const])): x (B, N, C), CLS included, -> (B, M, D); survey eq. 11.

    C = input_dim, D = output_dim, M = output_length, r = hidden_dim. Blocks are nn.TransformerEncoderLayer's equation,
    norm first: full self-attention, ReLU, feed-forward 2 r, eps 1e-5, no dropout, no final norm. proj_bias: of `down`
    and `up`. Eq. 11 prints W_up as r x C; upstream maps r to the language model's width, and so does this.

    Parameters `const` (M, r), N(0, 1), `down`, `up`, and those of `layers.{l}` as in SelfAttentionBlock. Initialised as
    nn.TransformerEncoder, whose layers start as copies of one. Source: mair-lab/mapl mapl.py; arXiv 2210.07179.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 4,
        output_length: int = 32,
        *,
        proj_bias: bool = True,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive(input_dim=input_dim, num_layers=num_layers, output_length=output_length)
        made = {"device": device, "dtype": dtype}
        self.input_dim, self.output_length = input_dim, output_length
        self.down = nn.Linear(input_dim, hidden_dim, bias=proj_bias, **made)
        self.up = nn.Linear(hidden_dim, output_dim, bias=proj_bias, **made)
        block = SelfAttentionBlock(hidden_dim, num_heads, 2 * hidden_dim, act="relu", level=level, **made)
        nn.init.xavier_uniform_(block.qkv.weight)
        nn.init.zeros_(block.qkv.bias)
        nn.init.zeros_(block.proj.bias)
        self.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(num_layers))
        self.const = nn.Parameter(torch.randn(output_length, hidden_dim, **made))

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.input_dim)
        rows = slice(x.shape[1], None)
        return self.up(run(self.layers, with_constants(self.down(x), self.const), rows))

    def extra_repr(self) -> str:
        return f"output_length={self.output_length}"


class MetaMapper(nn.Module):
    """Meta-Mapper: p learned prefixes attend to themselves and to one image embedding: x (B, C) -> (B, p, D).

        s = [prefix; x],  q, k, v = s W_qᵀ + b_q, ...,  heads of width w = C // num_heads
        o = drop(q + softmax(q kᵀ / sqrt(C)) v),  z = LN(o),  y = LN(drop(z + leaky_relu(z W_oᵀ + b_o)))

    C = dim_clip, D = dim_gpt_embedding, a multiple of w. Only the prefixes' rows are computed, whose queries, and whose
    own keys and values, are the same for every image. The scale is C^-0.5, not w^-0.5; the skip is the projected query.

    `vars` is upstream's flat list: prefix (p, C); W_q (D, C), b_q; W_k, b_k; W_v, b_v; W_o (D, D), b_o; the two norms'
    weights and biases (eps 1e-5). An inner loop passes its updated list to forward: the reference backend
    differentiates twice, kernels once.

    Args:
        dropout: probability, 0.5 upstream.
        always: upstream drops in evaluation too, by leaving out the switch; here dropout follows `training` unless
            asked to do that.

    Xavier-uniform weights, zero biases, prefix N(0, 1).
    Source: ivonajdenkoska/multimodal-meta-learn src/meta_learner.py; arXiv 2302.14794.
    """

    def __init__(
        self,
        dim_clip: int,
        dim_gpt_embedding: int,
        prefix_length: int = 4,
        *,
        num_heads: int = 8,
        dropout: float = 0.5,
        always: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive(dim_clip=dim_clip, dim_gpt_embedding=dim_gpt_embedding, prefix_length=prefix_length)
        self.head_dim = dim_clip // num_heads if num_heads > 0 else 0
        if self.head_dim < 1 or dim_gpt_embedding % self.head_dim:
            raise ValueError(
                f"dim_gpt_embedding is {dim_gpt_embedding}, dim_clip {dim_clip}, num_heads {num_heads}; accepted: "
                "dim_gpt_embedding a multiple of the head width dim_clip // num_heads"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: a probability")
        self.dim_clip, self.dropout, self.always = dim_clip, float(dropout), always
        C, D = dim_clip, dim_gpt_embedding
        self.shapes = ((prefix_length, C), *((D, C), (D,)) * 3, (D, D), *((D,),) * 5)
        self.vars = nn.ParameterList(nn.Parameter(torch.zeros(s, device=device, dtype=dtype)) for s in self.shapes)
        nn.init.normal_(self.vars[0])
        for i in (1, 3, 5, 7):
            nn.init.xavier_uniform_(self.vars[i])
        for i in (9, 11):
            nn.init.ones_(self.vars[i])

    def forward(self, x: Tensor, vars: Sequence[Tensor] | None = None) -> Tensor:
        check_vectors("x", x, self.dim_clip)
        vars = list(self.vars) if vars is None else list(vars)
        if [tuple(t.shape) for t in vars] != list(self.shapes):
            raise ValueError(
                f"vars has the shapes {[tuple(t.shape) for t in vars]}; accepted: {list(map(tuple, self.shapes))}"
            )
        prefix, wq, bq, wk, bk, wv, bv, wo, bo, w1, b1, w2, b2 = vars
        own = self._heads(F.linear(prefix, torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv)))[None], 3)
        image = self._heads(F.linear(x[:, None], torch.cat((wk, wv)), torch.cat((bk, bv))), 2)
        q, k, v = own
        y = cross_attention(q, k, v, *image, scale=self.dim_clip**-0.5)
        o = self._dropped((q + y).flatten(-2))
        z = F.leaky_relu(linear_projector(o, wo, bo, w1, b1, norm="layer"))
        o = self._dropped(norm_residual(o, z, w1, b1))
        return F.layer_norm(o, o.shape[-1:], w2, b2)

    def _heads(self, y: Tensor, count: int) -> tuple[Tensor, ...]:
        return y.unflatten(-1, (count, -1, self.head_dim)).unbind(-3)

    def _dropped(self, o: Tensor) -> Tensor:
        return F.dropout(o, self.dropout, self.training or self.always)

    def extra_repr(self) -> str:
        return f"prefix_length={self.shapes[0][0]}, dropout={self.dropout:g}, always={self.always}"


# -- shared --------------------------------------------------------------------------------------------------------


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; accepted: 1 or more")


def check_vectors(name: str, x: Tensor, channels: int) -> None:
    if x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (B, C) with C = {channels}")
