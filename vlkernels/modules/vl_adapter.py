"""VL-Adapter: adapters of tasks, shared in part, made of Kronecker products, of low rank, or by a hyper-network.

Sung et al., arXiv 2112.06825; ylsung/VL_adapter VL-T5/src/adapters. Compacter: 2106.04647; Hyperformer: 2106.04489.
They stand after the self-attention and after the feed-forward of every layer of BART or T5, before the residual add;
the language model's layer norms are trained too. How they are called: `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bottleneck_adapter import bottleneck_adapter
from ._adapter import (
    FUNCTIONS,
    OP_ACTS,
    Activation,
    Branch,
    Projection,
    SublayerAdapter,
    bottleneck,
    ended,
    normed_sum,
    rank_of,
)

_KINDS = ("adapter", "compacter", "low_rank")


class PHMLinear(Projection):
    """y = x H + b, H (in, out) = sum over i of kron(C_i, W_i), W_i (in/k, out/k) = W_left_i W_right_i, of `rank`.

    Parameters: `phm_rule` C (k, k, k), N(0, 1e-4), which several layers may share (`share_phm_rule`); `W_left`
    (k, in/k, rank) and `W_right` (k, rank, out/k), or with factorized=False `W` (k, in/k, out/k), Glorot-uniform with
    gain sqrt 2; `b` (out), zeros.
    """

    def __init__(self, width: int, out: int, k: int = 4, *, rank: int = 1, factorized: bool = True, **made):
        super().__init__()
        if k < 1 or width % k or out % k or rank < 1:
            raise ValueError(
                f"{width} -> {out} in k={k} parts of rank {rank}; accepted: a divisor of both, rank 1 or more"
            )
        self.k = k
        self.phm_rule = nn.Parameter(torch.empty(k, k, k, **made).normal_(std=1e-4))
        if factorized:
            self.W_left, self.W_right = _glorot(k, width // k, rank, **made), _glorot(k, rank, out // k, **made)
        else:
            self.W = _glorot(k, width // k, out // k, **made)
        self.b = nn.Parameter(torch.zeros(out, **made))

    def dense(self) -> tuple[Tensor, Tensor]:
        w = self.W if hasattr(self, "W") else self.W_left @ self.W_right
        # H[a p + c, b q + d] = sum over i of C_i[a, b] W_i[c, d]; the weight is its transpose
        h = torch.einsum("iab,icd->bdac", self.phm_rule.to(w.dtype), w)
        return h.reshape(self.b.shape[0], -1), self.b

    def extra_repr(self) -> str:
        return f"k={self.k}, rank={self.W_left.shape[-1] if hasattr(self, 'W_left') else None}"


class LowRankLinear(Projection):
    """y = x W_left W_right + b: (in, rank) and (rank, out), Glorot-uniform with gain sqrt 2; `b` (out), zeros."""

    def __init__(self, width: int, out: int, rank: int = 1, **made):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; accepted: 1 or more")
        self.W_left, self.W_right = _glorot(width, rank, **made), _glorot(rank, out, **made)
        self.b = nn.Parameter(torch.zeros(out, **made))

    def dense(self) -> tuple[Tensor, Tensor]:
        return (self.W_left @ self.W_right).t(), self.b


def _glorot(*shape: int, **made) -> nn.Parameter:
    """Of the last two axes: each of k matrices has its own fans."""
    bound = 2.0**0.5 * (6.0 / (shape[-2] + shape[-1])) ** 0.5
    return nn.Parameter(torch.empty(shape, **made).uniform_(-bound, bound))


def share_phm_rule(model: nn.Module, rule: nn.Parameter | None = None) -> nn.Parameter:
    """One C for all PHMLinear of the model: `rule`, or that of the first. It is returned."""
    layers = [m for m in model.modules() if isinstance(m, PHMLinear)]
    if not layers:
        raise ValueError("the model has no PHMLinear; accepted: one with Compacter adapters")
    rule = layers[0].phm_rule if rule is None else rule
    for layer in layers:
        if layer.phm_rule.shape != rule.shape:
            raise ValueError(f"rule has shape {tuple(rule.shape)}; accepted: {tuple(layer.phm_rule.shape)}")
    for layer in layers:
        layer.phm_rule = rule
    return rule


class VLAdapter(Branch):
    """up_sampler(act(down_sampler(x))): the bottleneck of one task, without x itself.

    kind: "adapter" (Linear), "compacter" (PHMLinear, with k, phm_rank, factorized) or "low_rank" (LowRankLinear, with
    low_rank_rank). Parameters: `down_sampler`, `up_sampler`.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        kind: str = "adapter",
        act: str = "gelu_new",
        k: int = 4,
        phm_rank: int = 1,
        factorized: bool = True,
        low_rank_rank: int = 1,
        **made,
    ):
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"kind is {kind!r}; accepted: {', '.join(_KINDS)}")
        make = {
            "adapter": lambda *sizes: nn.Linear(*sizes, **made),
            "compacter": lambda *sizes: PHMLinear(*sizes, k, rank=phm_rank, factorized=factorized, **made),
            "low_rank": lambda *sizes: LowRankLinear(*sizes, low_rank_rank, **made),
        }[kind]
        self.activation = Activation(act)
        self.down_sampler, self.up_sampler = make(width, rank), make(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_sampler(self.activation(self.down_sampler(x)))

    def apply_to(self, x: Tensor, **words) -> Tensor:
        """The bottleneck with what the op adds to it."""
        kinds = (nn.Linear, PHMLinear, LowRankLinear)
        before = words.get("norm")
        return bottleneck(
            x, self.down_sampler, self.up_sampler, self.activation, kinds=kinds, around=(self,),
            whole=lambda t: self(t if before is None else before(t)), **words,
        )  # fmt: skip


class VLAdapterController(SublayerAdapter):
    """branch(h, task=) = [post_layer_norm](up(gelu_new(down([pre_layer_norm] h)))) + h, with an adapter of each task.

    Args:
        width: D. tasks: their names. r, reduction: the rank, D // reduction where r is None; upstream's scripts have 8.
        kind: "adapter", "compacter" or "low_rank"; k, phm_rank, factorized, low_rank_rank: see VLAdapter. Upstream's
            published single Compacter is k=2, factorized=False, shared_phm_rule=False.
        single: one adapter under all names. share_down, share_up: only that projection is one (half-shared).
        shared_phm_rule: one C for down and up of all tasks (`share_phm_rule(model)`: of a whole model);
        shared_phm_rule_over_tasks: one for the tasks' downs and one for their ups.
        ln_before, ln_after: the norms, one for all tasks. act: transformers' name.

    Parameters: `adapters.<task>.{down,up}_sampler.*`, repeated in the state dict where they are shared, of Linears
    `weight`, `bias`, as nn.Linear starts them; `pre_layer_norm`, `post_layer_norm`.
    Source: adapter_controller.py, adapter_modeling.py.
    """

    def __init__(
        self,
        width: int,
        tasks: Sequence[str] = ("default",),
        *,
        r: int | None = None,
        reduction: float = 8,
        kind: str = "adapter",
        single: bool = False,
        share_down: bool = False,
        share_up: bool = False,
        shared_phm_rule: bool = True,
        shared_phm_rule_over_tasks: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        act: str = "gelu_new",
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if not tasks or isinstance(tasks, str) or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks is {tasks!r}; accepted: one name or more, each once")
        self.adapters = nn.ModuleDict()
        first = None
        for task in tasks:
            if single and first is not None:
                self.adapters[task] = first
                continue
            adapter = VLAdapter(width, rank_of(width, reduction, r), kind=kind, act=act, **options, **made)
            first = first or adapter
            if share_down:
                adapter.down_sampler = first.down_sampler
            if share_up:
                adapter.up_sampler = first.up_sampler
            self.adapters[task] = adapter
        if kind == "compacter" and shared_phm_rule:
            share_phm_rule(self)
        elif kind == "compacter" and shared_phm_rule_over_tasks:
            for name in ("down_sampler", "up_sampler"):
                share_phm_rule(nn.ModuleList(getattr(a, name) for a in self.adapters.values()))
        self.pre_layer_norm = nn.LayerNorm(width, **made) if ln_before else None
        self.post_layer_norm = nn.LayerNorm(width, **made) if ln_after else None

    def adapter(self, task: str | None = None) -> VLAdapter:
        """The task's, or the first."""
        task = next(iter(self.adapters)) if task is None else task
        if task not in self.adapters:
            raise ValueError(f"task is {task!r}; accepted: {', '.join(self.adapters)}")
        return self.adapters[task]

    def _end(self, hidden, residual, norm, add, task=None):
        adapter, residual = self.adapter(task), residual if add else None
        before, after = self.pre_layer_norm, self.post_layer_norm
        if after is None:
            return adapter.apply_to(hidden, norm=before, skip="add", residual=residual)
        y = normed_sum(adapter.apply_to(hidden, norm=before), after, hidden)
        return y if residual is None else y + residual

    def value(self, x: Tensor, base: Tensor, task: str | None = None) -> Tensor:
        """base + the bottleneck of x: beside a projection, as VL-PET's decoder has it."""
        return self.adapter(task).apply_to(x, norm=self.pre_layer_norm, base=base)


# -- Hyperformer ---------------------------------------------------------------------------------------------------


class AdapterWeights(NamedTuple):
    """What the hyper-network made for one adapter: weights (R, D) and (D, R), and the norms' (weight, bias) or None."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    pre: tuple[Tensor, Tensor] | None = None
    post: tuple[Tensor, Tensor] | None = None


class VLHyperformer(SublayerAdapter):
    """Adapters of all tasks, layers and places from one hyper-network: branch(h, task=, layer=, block=).

        e = LayerNorm(generator(task embedding ++ layer embedding ++ block embedding)), eps 1e-6
        branch(h) = [norm](up(gelu_new(down([norm] h)))) + h, weights and biases of down, up and norms linear in e

    block: "ff", "attn" or "cross". `weights(task, layer, block)` makes an adapter's weights, for use in several calls
    (`weights=`). ln_before, ln_after: norms whose weight and bias are made too. layers: of the model.

    Parameters: `task_embed.task_to_embeddings.<task>` (task_dim), N(0, 1); `hyper.layer_id_embeddings` (layers,
    task_dim), `hyper.adapters_block_type` (3, task_dim), `hyper.task_hypernet.task_embeding_generator.{0,2}` (hidden,
    proj_dim), `hyper.LayerNorm`, `hyper.{down,up}_sampler_hyper_net.{weight,bias}_generator.0`, and
    `hyper.{pre,post}_layernorm_hypernet.{weight,bias}_generator`; linears N(0, 0.01), biases zero. Source:
    adapter_hypernetwork.py.
    """

    BLOCKS = ("ff", "attn", "cross")

    def __init__(
        self,
        width: int,
        tasks: Sequence[str],
        layers: int,
        *,
        task_dim: int = 64,
        hidden: int = 128,
        proj_dim: int = 64,
        r: int | None = None,
        reduction: float = 8,
        ln_before: bool = False,
        ln_after: bool = False,
        act: str = "gelu_new",
        device=None,
        dtype=None,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if not tasks or isinstance(tasks, str) or layers < 1:
            raise ValueError(f"tasks is {tasks!r}, layers {layers}; accepted: one name or more, 1 layer or more")
        self.rank, self.layers, self.act = rank_of(width, reduction, r), layers, Activation(act)
        self.task_embed, self.hyper = nn.Module(), nn.Module()
        self.task_embed.task_to_embeddings = nn.ParameterDict(
            {task: nn.Parameter(torch.randn(task_dim, **made)) for task in tasks}
        )
        h = self.hyper
        h.layer_id_embeddings = nn.Embedding(layers, task_dim, **made)
        h.adapters_block_type = nn.Embedding(len(self.BLOCKS), task_dim, **made)
        h.task_hypernet = nn.Module()
        h.task_hypernet.task_embeding_generator = nn.Sequential(
            nn.Linear(3 * task_dim, hidden, **made), nn.ReLU(), nn.Linear(hidden, proj_dim, **made)
        )
        h.LayerNorm = nn.LayerNorm(proj_dim, eps=1e-6, **made)
        sizes = {"down": (self.rank * width, self.rank), "up": (self.rank * width, width)}
        for name, (weight, bias) in sizes.items():
            net = nn.Module()
            net.weight_generator = nn.Sequential(nn.Linear(proj_dim, weight, **made))
            net.bias_generator = nn.Sequential(nn.Linear(proj_dim, bias, **made))
            h.add_module(f"{name}_sampler_hyper_net", net)
        for name, wanted in (("pre", ln_before), ("post", ln_after)):
            net = nn.Module() if wanted else None
            if wanted:
                net.weight_generator = nn.Linear(proj_dim, width, **made)
                net.bias_generator = nn.Linear(proj_dim, width, **made)
            h.add_module(f"{name}_layernorm_hypernet", net)
        for module in h.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1e-2)
                nn.init.zeros_(module.bias)

    def embedding(self, task: str, layer: int, block: str) -> Tensor:
        """e (proj_dim) of one adapter."""
        tasks = self.task_embed.task_to_embeddings
        if task not in tasks:
            raise ValueError(f"task is {task!r}; accepted: {', '.join(tasks.keys())}")
        if block not in self.BLOCKS or not 0 <= layer < self.layers:
            raise ValueError(
                f"layer is {layer}, block {block!r}; accepted: 0 to {self.layers - 1}, {', '.join(self.BLOCKS)}"
            )
        h = self.hyper
        parts = tasks[task], h.layer_id_embeddings.weight[layer], h.adapters_block_type.weight[self.BLOCKS.index(block)]
        return h.LayerNorm(h.task_hypernet.task_embeding_generator(torch.cat(parts)))

    def weights(self, task: str, layer: int, block: str) -> AdapterWeights:
        e, h = self.embedding(task, layer, block), self.hyper

        def made(net: nn.Module) -> tuple[Tensor, Tensor]:
            return net.weight_generator(e), net.bias_generator(e)

        (down, down_bias), (up, up_bias) = made(h.down_sampler_hyper_net), made(h.up_sampler_hyper_net)
        pre, post = (None if n is None else made(n) for n in (h.pre_layernorm_hypernet, h.post_layernorm_hypernet))
        return AdapterWeights(
            down.view(self.rank, self.width), down_bias, up.view(self.width, self.rank), up_bias, pre, post
        )

    def _end(self, hidden, residual, norm, add, task=None, layer=0, block="ff", weights=None):
        if weights is None:
            task = next(iter(self.task_embed.task_to_embeddings)) if task is None else task
            weights = self.weights(task, layer, block)
        residual, w = residual if add else None, weights
        words = {"norm": "layer", "norm_weight": w.pre[0], "norm_bias": w.pre[1]} if w.pre is not None else {}
        ends = {"skip": "add", "residual": residual} if w.post is None else {"skip": "none"}
        if self.act.name in OP_ACTS:
            y = bottleneck_adapter(
                hidden, w.down, w.up, w.down_bias, w.up_bias, act=OP_ACTS[self.act.name], **words, **ends
            )
        else:
            n = hidden if w.pre is None else F.layer_norm(hidden, hidden.shape[-1:], *w.pre)
            b = F.linear(FUNCTIONS[self.act.name](F.linear(n, w.down, w.down_bias)), w.up, w.up_bias)
            y = ended(b, hidden, **ends)
        if w.post is None:
            return y
        return ended(F.layer_norm(y, y.shape[-1:], *w.post), hidden, None, residual, skip="add")
