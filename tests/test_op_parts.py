"""An op whose weight (or input) is made of pieces keeps the pieces for backward, not the whole."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import cross_attention, linear_projector, multi_layer_kv
from vlkernels.ops import _source
from vlkernels.testing import meter

pytestmark = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
torch.set_num_threads(1)


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 16, generator=generator).requires_grad_()
    pieces = [nn.Parameter(torch.randn(8, 16, generator=generator)) for _ in range(2)]
    norm = {"norm": "layer", "norm_weight": nn.Parameter(torch.rand(16, generator=generator) + 0.5)}
    return x, pieces, norm


def projector(x, weight, parts, norm):
    return linear_projector(x, weight, parts=parts, backend="triton", **norm)


def all_layers(x, weight, parts, norm):
    norm = norm | {"norm_weight": norm["norm_weight"].expand(2, -1)}
    return multi_layer_kv(x, weight, parts=parts, layers=2, backend="triton", **norm)


@pytest.mark.parametrize("op", [projector, all_layers])
@pytest.mark.parametrize("compiled", [False, True])
def test_pieces_are_kept(op, compiled):
    """Output and gradients are the same bits, and the concatenation is not among what is saved."""
    results, saved = [], []

    def run(listed: bool) -> None:
        x, pieces, norm = made()
        leaves = (x, *pieces, norm["norm_weight"])
        torch._dynamo.reset()
        call = lambda: op(x, torch.cat(pieces), list(pieces) if listed else (), norm)  # noqa: E731
        call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        y = call()
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
        saved.append(meter.saved_bytes(call, apart=leaves))

    run(listed=False)
    run(listed=True)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if not compiled:
        assert saved[0] - saved[1] == 4 * 16 * 16


def test_frozen_pieces():
    """Frozen weights get no gradient, and x still has one."""
    x, pieces, norm = made()
    for p in pieces:
        p.requires_grad_(False)
    y = projector(x, torch.cat(pieces), pieces, norm)
    want = projector(x, torch.cat(pieces), (), norm)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize(
    "how, norm", [("eager", "layer"), ("eager", "rms"), ("compiled", "layer"), ("checkpointed", "layer")]
)
def test_recomputed_keys_keep_what_x_and_weights_are_made_of(how, norm):
    """Neither the normalised x nor the folded weight; gradients of x, weights, scale and columns as without."""
    results, saved = [], []
    generator = torch.Generator().manual_seed(0)
    q, raw, bias, *leaves = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 5, 2, 4), (2, 7, 16), (16,), (8, 16), (8, 16), (16,), (8, 3))
    )
    leaves = [q, raw, bias, *(nn.Parameter(t) for t in leaves)]
    for t in leaves[:3]:
        t.requires_grad_()
    places = torch.rand(1, 7, 3, generator=generator)

    def call(listed: bool):
        x_parts, kv_parts = [raw, places], leaves[3:]
        x, weight = _source.tokens(x_parts, norm, 1e-5, None), _source.weights(kv_parts)
        lists = {"x_parts": x_parts, "kv_parts": kv_parts} if listed else {}
        options = {"x_norm": norm, "x_eps": 1e-5, "backend": "triton"}
        return cross_attention(q, x=x, kv_weight=weight, kv_bias=bias, **options, **lists)

    for listed in (False, True):
        run = lambda listed=listed: call(listed)  # noqa: E731
        if how == "compiled":
            torch._dynamo.reset()
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        elif how == "checkpointed":
            run = lambda run=run: checkpoint(run, use_reentrant=False)  # noqa: E731
        y = run()
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        saved.append(meter.saved_bytes(run, apart=[*leaves, places]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.abs().max() > 0 for t in results[0])
    if how == "eager":
        assert saved[0] - saved[1] == 4 * (2 * 7 * 19 + 16 * 19)
