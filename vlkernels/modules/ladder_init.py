"""First weights of a side network: rows and columns of the backbone's, chosen by importance. arXiv 2206.06522, 3.3.

Upstream walks the weights in the order in which the residual stream passes them. A weight keeps the columns that the
one before it kept as rows, then the 1 / R of its rows whose importance, summed over the kept columns, is the largest.
q, k and v of an attention keep the same rows, by the product of their importances. Each writer of the residual stream
chooses for itself: a column of the stream is not the same channel all the way up. Kept rows stay in ascending order;
upstream's are the same, in the order of a Python set.

Importance is the Fisher information, the sum over samples of the squared gradient of the loss (`fisher_importance`);
without it the weight's magnitude. Source: VL-T5/src/pruning/pruning_methods.py `pruning_v2`, fisher.py, method "label",
"square", 1024 samples of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn


def fisher_importance(model: nn.Module, batches: Iterable[Mapping], samples: int = 1024) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient of model(**batch).loss, for each parameter by its name.

    Take it from the model before it gets its ladder, from batches of one sample: the square of a mean is not the mean
    of squares. Runs in eval mode; training mode, requires_grad and gradients are what they were afterwards.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; accepted: 1 or more")
    parameters = dict(model.named_parameters())
    before = [(p, p.requires_grad) for p in parameters.values()]
    modes = [(m, m.training) for m in model.modules()]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    try:
        model.eval()
        for p, _ in before:
            p.requires_grad_(True)
        for batch in islice(batches, samples):
            with torch.enable_grad():
                loss = model(**batch).loss
                if loss is None:
                    raise ValueError("the model gives no loss; accepted: batches with labels")
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.square()
            count += 1
    finally:
        for p, needed in before:
            p.requires_grad_(needed)
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("batches is empty; accepted: at least one batch with labels")
    return total


def strongest(importance: Tensor, keep: int) -> Tensor:
    """The `keep` rows of the largest sum of |importance|, ascending."""
    return importance.abs().flatten(1).sum(1).argsort(descending=True, stable=True)[:keep].sort().values


class Pruning:
    """The walk: `state` and `importance` by the backbone's names, `columns` the channels of the stream kept last."""

    def __init__(self, state: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None, embedding: str, keep: int):
        self.state = state
        self.importance = state if importance is None else importance
        self.found: dict[str, Tensor] = {}
        self.columns = strongest(self._importance(embedding).t(), keep)

    def _weight(self, name: str) -> Tensor:
        if not self.state[name].is_floating_point():
            raise ValueError(f"{name} is {self.state[name].dtype}; accepted: floating point, or init='random'")
        return self.state[name]

    def _importance(self, name: str) -> Tensor:
        value = self.importance.get(name)
        self._weight(name)
        if value is None or value.shape != self.state[name].shape:
            got = "nothing" if value is None else tuple(value.shape)
            raise ValueError(f"importance has {got} for {name!r}; accepted: {tuple(self.state[name].shape)}")
        return value.float()

    def norm(self, name: str) -> None:
        self.found[name] = self.state[name][self.columns]

    def linears(self, names: Iterable[str], keep: int, rows: Tensor | None = None) -> Tensor:
        """Prune weights that read the same columns and keep the same rows: the strongest, or `rows`; returns those."""
        names = list(names)
        if rows is None:
            product = torch.stack([self._importance(n)[:, self.columns].abs() for n in names]).prod(0)
            rows = strongest(product, keep)
        for name in names:
            self.found[name] = self._weight(name)[rows][:, self.columns]
        return rows

    def through(self, into: Iterable[str], inner: int, out: str, keep: int) -> None:
        """A branch of the stream: weights into `inner` rows, then the one back to the stream's next `keep` channels."""
        self.columns = self.linears(into, inner)
        self.columns = self.linears([out], keep)


def prune_t5(
    state: Mapping[str, Tensor], reduction: int, importance: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights of T5's layers and last norms over `reduction`, by the backbone's names; the encoder first.

    The feed-forward's two input weights of a gated T5 keep the same rows; upstream knows ungated ones.
    """
    width = state["shared.weight"].shape[1]
    walk = Pruning(state, importance, "shared.weight", width // reduction)
    for part in ("encoder", "decoder"):
        count = 1 + max(int(n.split(".")[2]) for n in state if n.startswith(f"{part}.block."))
        for i in range(count):
            block = f"{part}.block.{i}.layer."
            layers = 1 + max(int(n[len(block) :].split(".")[0]) for n in state if n.startswith(block))
            for j in range(layers):
                walk.norm(f"{block}{j}.layer_norm.weight")
                if j == layers - 1:
                    stem = f"{block}{j}.DenseReluDense."
                    into = [n for n in (f"{stem}wi.weight", f"{stem}wi_0.weight", f"{stem}wi_1.weight") if n in state]
                    out = f"{stem}wo.weight"
                else:
                    stem = f"{block}{j}.{'EncDecAttention' if j else 'SelfAttention'}."
                    into, out = [f"{stem}{n}.weight" for n in "qkv"], f"{stem}o.weight"
                walk.through(into, state[into[0]].shape[0] // reduction, out, width // reduction)
        walk.norm(f"{part}.final_layer_norm.weight")
    return walk.found


def prune_llama(
    state: Mapping[str, Tensor],
    reduction: int,
    heads: int,
    kv_heads: int,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The same walk over a Llama (our extension; upstream has none).

    q and k keep in every head the rotary pairs 0, R, 2R, ..., the ones whose frequencies a head of width / R has; v
    keeps the strongest channels of each key/value head, and o the columns that read them.
    """
    embedding = "model.embed_tokens.weight"
    width = state[embedding].shape[1]
    walk = Pruning(state, importance, embedding, width // reduction)
    count = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("model.layers."))
    for i in range(count):
        stem = f"model.layers.{i}."
        attention, mlp = stem + "self_attn.", stem + "mlp."
        walk.norm(stem + "input_layernorm.weight")
        head = state[attention + "v_proj.weight"].shape[0] // kv_heads
        pairs = torch.arange(head // reduction // 2, device=walk.columns.device) * reduction
        inside = torch.cat((pairs, pairs + head // 2))
        for name, n in (("q_proj", heads), ("k_proj", kv_heads)):
            rows = (torch.arange(n, device=inside.device)[:, None] * head + inside).flatten()
            walk.linears([f"{attention}{name}.weight"], len(rows), rows)
            _bias(walk, f"{attention}{name}.bias", rows)
        name = attention + "v_proj.weight"
        strength = walk._importance(name)[:, walk.columns].abs().unflatten(0, (kv_heads, head))
        channels = torch.stack([strongest(part, head // reduction) for part in strength])
        offsets = torch.arange(kv_heads, device=channels.device)[:, None] * head
        walk.linears([name], 0, (channels + offsets).flatten())
        _bias(walk, attention + "v_proj.bias", (channels + offsets).flatten())
        read = channels.repeat_interleave(heads // kv_heads, 0)
        walk.columns = (read + torch.arange(heads, device=read.device)[:, None] * head).flatten()
        walk.columns = walk.linears([attention + "o_proj.weight"], width // reduction)
        _bias(walk, attention + "o_proj.bias", walk.columns)
        walk.norm(stem + "post_attention_layernorm.weight")
        rows = walk.linears([f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"],
                            state[f"{mlp}up_proj.weight"].shape[0] // reduction)  # fmt: skip
        _bias(walk, f"{mlp}gate_proj.bias", rows)
        _bias(walk, f"{mlp}up_proj.bias", rows)
        walk.columns = rows
        walk.columns = walk.linears([f"{mlp}down_proj.weight"], width // reduction)
        _bias(walk, f"{mlp}down_proj.bias", walk.columns)
    walk.norm("model.norm.weight")
    return walk.found


def _bias(walk: Pruning, name: str, rows: Tensor) -> None:
    if name in walk.state:
        walk.found[name] = walk.state[name][rows]
