"""CogVLM's and mPLUG-Owl2's layers beside their equations with gathered rows; training and generation."""

import pytest
import torch
from torch import nn

import vlkernels
from benchmarks.upstream_blocks import expert_layer as eager
from vlkernels.modules import CogVLMDecoderLayer, MPLUGOwl2DecoderLayer, cogvlm_position_ids, cogvlm_vision_mask
from vlkernels.testing import compare, meter

D, FF, H = 32, 44, 4
TYPES = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 0]])
KINDS = {
    "cogvlm": lambda **kw: CogVLMDecoderLayer(D, FF, H, **kw),
    "cogvlm2": lambda **kw: CogVLMDecoderLayer(D, FF, H, 2, vision_bias=True, rope_theta=500000.0, **kw),
    "mplug_owl2": lambda **kw: MPLUGOwl2DecoderLayer(D, FF, H, **kw),
}


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = KINDS[kind](dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5) + (p.dim() == 1))
    return layer


def step(call, layer, x, dy):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = call(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_upstreams_way(kind, dtype):
    """Outputs and all gradients by the rule: upstream's error and the scale over five draws."""
    layer = made(kind, dtype)
    wide = made(kind).double()
    wide.load_state_dict(layer.state_dict())
    worst = {}
    for seed in compare.SEEDS:
        g = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(3, 9, D, generator=g).to(dtype) for _ in range(2))
        exact = step(lambda t: eager(wide, t, TYPES), wide, x.double(), dy.double())
        usual = step(lambda t: eager(layer, t, TYPES), layer, x, dy)
        got = {}
        if seed == 0:
            with vlkernels.use_backend("triton"):
                got = step(lambda t: layer(t, TYPES), layer, x, dy)
        for name, truth in exact.items():
            errors = worst.setdefault(name, [0.0, 0.0, 0.0])
            for i, values in enumerate((got, usual)):
                errors[i] = max(errors[i], compare.worst(values[name], truth)[0] if values else 0.0)
            errors[2] = max(errors[2], float(truth.abs().max()))
    for name, (ours, theirs, scale) in worst.items():
        assert ours <= 2 * theirs + 4 * compare.ulp(scale, dtype), (name, ours, theirs)


def test_an_exchanged_expert_is_noticed():
    layer = made("cogvlm")
    x = torch.randn(3, 9, D)
    want = eager(layer, x, TYPES)
    layer.mlp.vision_mlp, layer.mlp.language_mlp = layer.mlp.language_mlp, layer.mlp.vision_mlp
    assert float((layer(x, TYPES) - want).detach().abs().max()) > 1e-2


# -- rules of CogVLM ---------------------------------------------------------------------------------------------------


def test_positions_and_vision_tokens():
    types = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
    assert cogvlm_vision_mask(types).tolist() == [[False, True, True, True, False, False, False]]
    assert cogvlm_position_ids(types).tolist() == [[0, 1, 2, 2, 3, 4, 5]]
    alone = torch.tensor([[0, 1, 0, 0]])
    assert not cogvlm_vision_mask(alone).any()
    assert cogvlm_position_ids(alone).tolist() == [[0, 1, 2, 3]]
    assert cogvlm_position_ids(torch.zeros(1, 4).long(), torch.tensor([[1, 1, 0, 0]])).tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_start_equal_are_a_plain_layer(kind):
    """At the start of training the types make no difference to the linears: bit for bit that of text."""
    layer = made(kind)
    layer.start_from_language()
    positions = torch.arange(9).expand(3, 9)
    x = torch.randn(3, 9, D)
    for backend in ("reference", "triton"):
        with vlkernels.use_backend(backend):
            assert torch.equal(layer(x, TYPES, position_ids=positions), layer(x, position_ids=positions))


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes(kind):
    """At the models' proportions, a sequence mostly of image, all trained."""
    dims = (64, 172, 4) if kind != "cogvlm2" else (64, 224, 4, 2)
    cls = MPLUGOwl2DecoderLayer if kind == "mplug_owl2" else CogVLMDecoderLayer
    layer = cls(*dims)
    types = torch.zeros(2, 120, dtype=torch.int64)
    types[:, 1:100] = 1
    x = torch.randn(2, 120, 64, requires_grad=True)
    apart = [x, *layer.parameters()]
    theirs = meter.saved_bytes(lambda: eager(layer, x, types), apart)
    with vlkernels.use_backend("triton"):
        ours = meter.saved_bytes(lambda: layer(x, types), apart)
    assert ours <= 0.62 * theirs, ours / theirs


@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_steps(kind):
    """A prompt with its images, then one token at a time: what the whole sequence gives at once."""
    layer = made(kind).double()
    x = torch.randn(3, 9, D, dtype=torch.float64)
    positions = cogvlm_position_ids(TYPES) if kind != "mplug_owl2" else torch.arange(9).expand(3, 9)
    types = TYPES.clone()
    types[:, 6:] = 0
    positions = cogvlm_position_ids(types) if kind != "mplug_owl2" else positions
    whole = layer(x, types, position_ids=positions)
    y, cache = layer(x[:, :6], types[:, :6], position_ids=positions[:, :6], use_cache=True)
    # the prompt's last token has a successor in the whole sequence: text comes behind the image there
    found = [y]
    for t in range(6, 9):
        y, cache = layer(x[:, t : t + 1], position_ids=positions[:, t : t + 1], cache=cache, use_cache=True)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding):
    """Tokens of padding change nothing for the others, and nothing is NaN."""
    layer = made("cogvlm")
    x, keep = torch.randn(2, 9, D), torch.ones(2, 9, dtype=torch.int64)
    at = slice(0, 3) if padding == "left" else slice(6, 9)
    keep[1, at] = 0
    x[1, at] = 0.0
    y = layer(x, torch.zeros(2, 9, dtype=torch.int64), keep, torch.arange(9).expand(2, 9))
    alone = x[1:, 3:] if padding == "left" else x[1:, :6]
    positions = torch.arange(9)[None, 3:] if padding == "left" else torch.arange(6)[None]
    want = layer(alone, position_ids=positions)
    got = y[1:, 3:] if padding == "left" else y[1:, :6]
    assert y.isfinite().all()
    exact = layer.double()(alone.double(), position_ids=positions)
    error = compare.beside("y", got, want, exact)
    assert error.ok, str(error)


@pytest.mark.parametrize("kind", ["cogvlm", "mplug_owl2"])
def test_compiles(kind):
    """One full graph, the uncompiled numbers; the assertion on the types is inside it."""
    layer = made(kind)
    x = torch.randn(3, 9, D, requires_grad=True)
    torch._dynamo.reset()
    with vlkernels.use_backend("triton"):
        call = torch.compile(lambda t: layer(t, TYPES), fullgraph=True, backend="aot_eager")
        got, want = call(x), layer(x, TYPES)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True) for y in (got, want)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lora_on_an_expert_is_honoured():
    """An expert that is no plain linear runs as it is; the others of its pair with it."""
    layer, x = made("cogvlm"), torch.randn(3, 9, D)
    want = layer(x, TYPES)

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    dense = layer.self_attn.vision_expert_dense
    layer.self_attn.vision_expert_dense = Twice(D, D, bias=False)
    layer.self_attn.vision_expert_dense.load_state_dict(dense.state_dict())
    got = layer(x, TYPES)
    dense.weight.data *= 2
    layer.self_attn.vision_expert_dense = dense
    exact = layer.double()(x.double(), TYPES)
    assert not torch.equal(got, want)
    error = compare.beside("y", got, layer.float()(x, TYPES), exact)
    assert error.ok, str(error)


def test_training_the_visual_expert_alone():
    """The language model is frozen: gradients are the visual expert's."""
    layer = made("cogvlm")
    for name, p in layer.named_parameters():
        p.requires_grad_("vision" in name)
    with vlkernels.use_backend("triton"):
        layer(torch.randn(3, 9, D), TYPES).sum().backward()
    assert all((p.grad is not None) == ("vision" in name) for name, p in layer.named_parameters())


@pytest.mark.parametrize("call, error, message", [
    (lambda layer, x: layer(x, TYPES * 2), RuntimeError, "token_type_ids holds other numbers than 0 and 1"),
    (lambda layer, x: layer(x, TYPES.float()), TypeError, "token_type_ids is torch.float32"),
    (lambda layer, x: layer(x, TYPES[:, :8]), ValueError, "token_type_ids has shape \\(3, 8\\)"),
    (lambda layer, x: layer(x, TYPES, torch.ones(3, 8)), ValueError, "attention_mask has shape \\(3, 8\\)"),
    (lambda layer, x: layer(x[..., :31], TYPES), ValueError, "x has shape \\(3, 9, 31\\)"),
    (lambda layer, x: layer(x[:, :1], cache=(torch.zeros(3, H, 2, 8),) * 2), ValueError, "position_ids is None"),
])  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(made("cogvlm"), torch.randn(3, 9, D))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="kv_heads that divides heads"):
        CogVLMDecoderLayer(D, FF, H, 3)
    with pytest.raises(ValueError, match="hidden_size is 30"):
        MPLUGOwl2DecoderLayer(30, FF, H)
    with pytest.raises(RuntimeError, match="modality_indicators holds other numbers"):
        made("mplug_owl2")(torch.randn(3, 9, D), TYPES - 1)
