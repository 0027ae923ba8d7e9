"""The Q-Former's equations in plain PyTorch, with data and the comparison that its tests share."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlkernels.modules import QFormer
from vlkernels.testing.compare import ulp

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
SLOW_BACKENDS = ["reference", pytest.param("triton", marks=[on_triton, pytest.mark.slow])]
B, M, T, N, C, D, H, V = 3, 5, 6, 9, 20, 16, 2, 23
LAVIS = -10000.0
OPS = {"cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv", "norm_residual"}


def make(layers=3, text=True, **options):
    words = {"vocab_size": V, "max_position_embeddings": 12} if text else {}
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0} | options
    return randomised(QFormer(D, layers, H, 24, 2, C, **words, **options))


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at its initial zero or one, which would hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(float(norm), 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return module


def data(device="cpu", dtype=torch.float32):
    x, queries = torch.randn(B, N, C), torch.randn(1, M, D)
    ids = torch.randint(1, V, (B, T))
    keep, seen = torch.ones(B, T, dtype=torch.long), torch.ones(B, N, dtype=torch.long)
    keep[1, 4:], keep[2, 2:], seen[0, 5:], seen[2, ::2] = 0, 0, 0, 0
    ids = ids.masked_fill(keep == 0, 0)
    return [t.to(device, dtype if t.is_floating_point() else None) for t in (x, queries, ids, keep, seen)]


# -- upstream's equations, from a state dict under our names -------------------------------------------------------


def lin(p, name, x):
    return x @ p[f"{name}.weight"].t() + p[f"{name}.bias"]


def norm(p, name, x, eps=1e-12):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attend(p, name, x, context, added):
    q, k, v = (
        lin(p, f"{name}.attention.{n}", t).unflatten(-1, (H, -1)).transpose(1, 2)
        for n, t in (("query", x), ("key", context), ("value", context))
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + added).softmax(-1)
    return norm(
        p, f"{name}.output.LayerNorm", lin(p, f"{name}.output.dense", (weights @ v).transpose(1, 2).flatten(2)) + x
    )


def feed(p, name, end, x):
    h = lin(p, f"{name}.output{end}.dense", F.gelu(lin(p, f"{name}.intermediate{end}.dense", x)))
    return norm(p, f"{name}.output{end}.LayerNorm", h + x)


def stock(p, queries, x, ids, added, image_added=0.0, layers=3):
    """One joint pass over [queries; text]; added: the scores' mask, broadcast to (B, 1, M + T, M + T)."""
    parts, m = [], 0
    if queries is not None:
        m = queries.shape[1]
        parts.append(queries.expand(x.shape[0], -1, -1))
    if ids is not None:
        words = F.embedding(ids, p["embeddings.word_embeddings.weight"], padding_idx=0)
        parts.append(words + p["embeddings.position_embeddings.weight"][: ids.shape[1]])
    h = norm(p, "layernorm", torch.cat(parts, 1))
    for i in range(layers):
        name = f"encoder.layer.{i}"
        h = attend(p, f"{name}.attention", h, h, added)
        q, t = h[:, :m], h[:, m:]
        if m and i % 2 == 0:
            q = attend(p, f"{name}.crossattention", q, x, image_added)
        h = torch.cat(
            ([feed(p, name, "_query", q)] if m else []) + ([feed(p, name, "", t)] if ids is not None else []), 1
        )
    return h


def scores(p, text):
    h = norm(p, "cls.LayerNorm", F.gelu(lin(p, "cls.dense", text)))
    return h @ p["embeddings.word_embeddings.weight"].t() + p["cls.bias"]


def penalty(keep, value, dtype):
    """(B, 1, 1, n): value where keep is 0, the dtype's lowest for None."""
    value = torch.finfo(dtype).min if value is None else value
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(keep == 0, value)[:, None, None]


def by_hand(mode, p, x, queries, ids, keep, seen, masked):
    dtype = x.dtype
    image = penalty(seen, None, dtype)
    if mode == "queries":
        return stock(p, queries, x, None, 0.0, image)
    if mode == "text":
        return stock(p, None, None, ids, penalty(keep, masked, dtype))
    full = torch.cat((keep.new_ones(B, M), keep), 1)
    if mode == "both":
        return stock(p, queries, x, ids, penalty(full, masked, dtype), image)
    # queries see queries, text t sees queries and the kept text <= t
    causal = torch.ones(M + T, M + T, dtype=torch.bool, device=x.device).tril()
    causal[:, :M] = True
    visible = causal[None] & full.bool()[:, None, :]
    added = torch.zeros(B, M + T, M + T, dtype=dtype, device=x.device).masked_fill(~visible, LAVIS)[:, None]
    hidden = stock(p, queries, x, ids, added, image)
    return torch.cat((hidden.flatten(1), scores(p, hidden[:, M:]).flatten(1)), 1)


def ours(mode, module, x, queries, ids, keep, seen):
    if mode == "queries":
        return module(queries, x, image_mask=seen).queries
    if mode == "text":
        return module(input_ids=ids, attention_mask=keep).text
    if mode == "both":
        return module(queries, x, ids, torch.cat((keep.new_ones(B, M), keep), 1), seen).hidden
    if mode == "joint":
        out = module(queries, x, ids, keep, seen, causal=True)
        hidden = out.hidden
    elif mode == "two passes":
        first = module(queries, x, image_mask=seen, use_cache=True)
        hidden = torch.cat((first.queries, module(input_ids=ids, attention_mask=keep, cache=first.cache).text), 1)
    else:
        found = module(queries, x, image_mask=seen, use_cache=True)
        parts, done = [found.queries], 0
        for step in (2, 1, T - 3):
            done += step
            found = module(
                input_ids=ids[:, done - step : done], attention_mask=keep[:, :done], cache=found.cache, use_cache=True
            )
            parts.append(found.text)
        hidden = torch.cat(parts, 1)
    return torch.cat((hidden.flatten(1), module.lm_logits(hidden[:, M:]).flatten(1)), 1)


def gradients(y, leaves: dict) -> dict:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {n: torch.zeros_like(leaf) if g is None else g
                                for (n, leaf), g in zip(leaves.items(), found, strict=True)}  # fmt: skip


def hand_gradients(mode, module, inputs, dtype, masked):
    p = {n: t.detach().to(dtype).requires_grad_() for n, t in module.named_parameters()}
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = by_hand(mode, p, *inputs, masked)
    return gradients(y, p | {"x": inputs[0], "queries": inputs[1]})


def close64(a, b):
    """Both in float64: equal but for the order of sums."""
    a, b = a.detach(), b.detach()
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    assert (a - b).abs().max() <= 2048 * ulp(float(b.abs().max()), torch.float64)
