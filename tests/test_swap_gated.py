"""transformers' gated cross-attention layers swapped: beside stock, what they fall back on, what stays."""

import copy
import pickle

import pytest
import torch

import vlkernels
from vlkernels.testing import compare, meter

pytest.importorskip("transformers")

torch.set_num_threads(1)
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")


def idefics(alpha="float", qk=False):
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = IdeficsConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, vision_config={"embed_dim": 20}, alpha_type=alpha,
        qk_layer_norms=qk,
    )  # fmt: skip
    config._attn_implementation = "eager"
    seen = torch.tensor([[[0, 0], [1, 0], [1, 1]], [[0, 1], [0, 1], [0, 0]]]).repeat_interleave(4, 2)

    def call(model, x, media):
        # upstream's eager softmax is in float32 for float64 too
        least = max(torch.finfo(x.dtype).min, torch.finfo(torch.float32).min)
        mask = torch.zeros(2, 1, 3, 8, dtype=x.dtype).masked_fill(seen[:, None] == 0, least)
        return model(x, None, media, mask, seen.any(-1).to(x.dtype))

    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0), call


def mllama(rows=True):
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import (
        MllamaCrossAttentionDecoderLayer,
        _prepare_cross_attention_mask,
    )

    config = MllamaTextConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, num_hidden_layers=1,
        cross_attention_layers=[0], pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    raw = torch.tensor([[[[1, 0]], [[0, 0]], [[1, 1]]], [[[0, 1]], [[0, 1]], [[0, 0]]]])

    def call(model, x, media):
        masks = _prepare_cross_attention_mask(raw, 4, x.dtype) if rows else (None, None)
        return model(x, media, masks[0], None, masks[1])

    return MllamaCrossAttentionDecoderLayer(config, 0), call


KINDS = {
    "idefics": idefics,
    "idefics vector qk-norm": lambda: idefics("vector", True),
    "mllama": mllama,
    "mllama unmasked": lambda: mllama(False),
}


def made(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model, call = KINDS[kind]()
    for p in model.parameters():
        p.data.normal_(std=0.2) if p.dim() == 2 else p.data.normal_(0.8, 0.2)
    return model.to(dtype), call


def step(model, call, inputs, autocast=None) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    x, media = (t.detach().requires_grad_() for t in inputs)
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = call(model, x, media)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "dmedia": media.grad} | {n: p.grad for n, p in model.named_parameters()}


def inputs(model, dtype=torch.float32, seed=2):
    g = torch.Generator().manual_seed(seed)
    width = model.cross_attn.k_proj.weight.shape[1]
    return [torch.randn(*n, generator=g).to(dtype) for n in ((2, 3, 24), (2, 8, width))]


@interpreted
@pytest.mark.parametrize(
    "kind, dtype, autocast",
    [
        ("idefics", torch.float32, None),
        ("idefics vector qk-norm", torch.float32, torch.bfloat16),
        ("mllama", torch.bfloat16, None),
        ("mllama unmasked", torch.float32, None),
    ],
)
def test_rule(kind, dtype, autocast):
    """Kernels in the limits that stock's errors in the same dtypes give, over five draws; against float64."""
    model, call = made(kind, dtype)
    double, baseline, scale = copy.deepcopy(model).double(), {}, {}
    for seed in reversed(compare.SEEDS):
        given = inputs(model, dtype, seed)
        exact = {n: t.clone() for n, t in step(double, call, [t.double() for t in given]).items()}
        usual = step(model, call, given, autocast)
        for n, truth in exact.items():
            baseline[n] = max(baseline.get(n, 0.0), compare.worst(usual[n], truth)[0])
            scale[n] = max(scale.get(n, 0.0), float(truth.abs().max()))
    dtypes = {n: t.dtype for n, t in usual.items()}
    assert vlkernels.swap(model, strict=True).swapped == [""]
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(model, call, given, autocast)
    assert counts["media_cross_attention_bwd_dq_kernel"] and counts["mlp_projector_act_bwd_kernel"]
    for n, truth in exact.items():
        assert got[n].dtype == dtypes[n]
        limit = 2 * baseline[n] + 4 * compare.ulp(scale[n], autocast or dtype)
        assert compare.worst(got[n], truth)[0] <= limit, n


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_stock(kind):
    """On the reference backend, and after unswap, every bit is stock's."""
    model, call = made(kind)
    keys, original = list(model.state_dict()), type(model)
    usual = {n: t.clone() for n, t in step(model, call, inputs(model)).items()}
    vlkernels.swap(model, strict=True)
    assert isinstance(model, original) and list(model.state_dict()) == keys
    with vlkernels.use_backend("reference"):
        again = {n: t.clone() for n, t in step(model, call, inputs(model)).items()}
    assert vlkernels.unswap(model) and type(model) is original
    back = step(model, call, inputs(model))
    assert all(torch.equal(again[n], usual[n]) and torch.equal(back[n], usual[n]) for n in usual)


@interpreted
@pytest.mark.parametrize("kind", ["idefics", pytest.param("mllama", marks=pytest.mark.slow)])
def test_falls_back_and_copies(kind):
    """A hook on a child, or another class of it, runs stock with a reason; copies train apart."""
    model, call = made(kind)
    given, child = inputs(model), model.cross_attn.q_proj
    want = call(model, *given)
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"):
        handle, seen = child.register_forward_hook(lambda *_: seen.append(1)), []
        assert torch.equal(call(model, *given), want) and seen
        assert "carries hooks" in model.vlkernels_state()[1]
        handle.remove()
        with meter.launches() as counts:
            first = call(model, *given)
        assert counts["media_cross_attention_fwd_kernel"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(other, *given), first)
            with torch.no_grad():
                other.mlp.up_proj.weight.zero_()
            assert not torch.equal(call(other, *given), first) and torch.equal(call(model, *given), first)
        with torch.no_grad():  # closed gates: the layer is its input
            for name, p in model.named_parameters():
                p.mul_(0 if name.endswith("_gate") or name.startswith("alpha") else 1)
        assert torch.equal(call(model, *given), given[0])


@interpreted
def test_upstreams_errors_and_its_cache():
    model, _ = made("idefics")
    vlkernels.swap(model)
    x, media = inputs(model)
    with vlkernels.use_backend("triton"), pytest.raises(ValueError, match="cross_attention_gate"):
        model(x, None, media)
    model, call = made("mllama")
    vlkernels.swap(model)
    x, media = inputs(model)
    from transformers import DynamicCache

    with vlkernels.use_backend("triton"), meter.launches() as counts:
        model(x, media, None, None, None, past_key_values=DynamicCache())
    assert not counts


@interpreted
@pytest.mark.slow
def test_compiles():
    model, call = made("mllama")
    vlkernels.swap(model, strict=True)
    given = inputs(model)
    torch._dynamo.reset()
    with vlkernels.use_backend("triton"):
        want = call(model, *given)
        compiled = torch.compile(lambda x, media: call(model, x, media), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given), want)
