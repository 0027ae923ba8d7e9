"""transformers' resamplers swapped: the rule beside stock, what they fall back on, and what stays as it was."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

import vlkernels
from vlkernels.testing import compare, meter

pytest.importorskip("transformers")

torch.set_num_threads(1)
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")


def idefics(qk=False):
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        perceiver_config={"qk_layer_norms_perceiver": qk}, vision_config={"embed_dim": 24}, hidden_size=24
    )
    return IdeficsPerceiverResampler(config, 24, 2, 2, 10, 5), (lambda model, x: model(x))


def idefics2():
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(
        hidden_size=24, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=6,
        num_key_value_heads=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return Idefics2PerceiverResampler(config), (lambda model, x: model(x, mask.to(x.device)))


def kosmos2():
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

    text = SimpleNamespace(embed_dim=24, attention_heads=4, attention_dropout=0.0, _attn_implementation="sdpa")
    config = SimpleNamespace(vision_config=SimpleNamespace(hidden_size=24), text_config=text, latent_query_num=5)
    model = Kosmos2ImageToTextProjection(config)
    model.x_attn.is_causal = False  # True in transformers 5.17, by mistake
    return model, (lambda model, x: model(x)[0])


KINDS = {
    "idefics 1": idefics,
    "idefics qk-norm": lambda: idefics(qk=True),
    "idefics2": idefics2,
    "kosmos2": kosmos2,
}


def made(kind: str, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model, call = KINDS[kind]()
    for p in model.parameters():
        # moderate scores: a sharp softmax makes the largest error of a draw a matter of luck
        p.data.normal_(std=0.2) if p.dim() > 1 else p.data.normal_(1.0, 0.3)
    return model.to(dtype), call


def step(model, call, x, autocast=None) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = call(model, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters()}


def inputs(dtype=torch.float32, seed=2):
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def judged(kind: str, name: str, low: bool) -> bool:
    """Whether two computations of a gradient can be told apart by their rounding.

    In 16 bits a ReLU's input near 0 changes its sign by rounding, and with it whole gradients, on either side.
    """
    return name == "y" or not (low and kind.startswith("idefics "))


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
)
def test_rule(kind, dtype, autocast):
    """Outputs and gradients on the kernels beside stock, in the same dtypes."""
    draws = []
    for seed in compare.SEEDS:
        model, call = made(kind, dtype, seed)
        x = inputs(dtype, seed)
        draws.append((step(model, call, x, autocast), step(copy.deepcopy(model).double(), call, x.double())))
    model, call = made(kind, dtype, 0)
    assert vlkernels.swap(model, strict=True).swapped[0] == ""
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(model, call, inputs(dtype, 0), autocast)
    backward = "cross_attention_bwd_dq_kernel" if kind == "idefics2" else "cross_attention_bwd_kernel"
    assert counts["cross_attention_fwd_kernel"] and counts[backward]
    low = torch.bfloat16 in (dtype, autocast)
    compare.assert_model(got, draws, autocast or dtype, lambda name: judged(kind, name, low))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_stock(kind):
    """On the reference backend, and after unswap, every bit is stock's."""
    model, call = made(kind)
    keys, x = list(model.state_dict()), inputs()
    usual = step(model, call, x)
    original = type(model)
    vlkernels.swap(model, strict=True)
    assert isinstance(model, original) and list(model.state_dict()) == keys
    with vlkernels.use_backend("reference"):
        again = step(model, call, x)
    assert vlkernels.unswap(model) and type(model) is original
    back = step(model, call, x)
    assert all(torch.equal(again[n], usual[n]) and torch.equal(back[n], usual[n]) for n in usual)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_falls_back(kind):
    """A hook, a subclass or another dtype on a child runs stock, with a reason; without it the kernels again."""
    model, call = made(kind)
    vlkernels.swap(model, strict=True)
    child = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    with vlkernels.use_backend("triton"):
        seen = []
        handle = child.register_forward_hook(lambda *_: seen.append(1))
        call(model, inputs())
        assert seen
        assert "carries hooks" in model.vlkernels_state()[1]
        handle.remove()
        with meter.launches() as counts:
            call(model, inputs())
        assert counts["cross_attention_fwd_kernel"]
        # another parameter object, as after a sharded load
        child.weight = torch.nn.Parameter(child.weight.detach() * 2)
        got = call(model, inputs())
    vlkernels.unswap(model)
    usual, exact = call(model, inputs()), call(model.double(), inputs(torch.float64))
    assert compare.beside("y", got, usual, exact).ok


@interpreted
@pytest.mark.parametrize("kind", [n if n == "kosmos2" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_copies(kind):
    """deepcopy and pickle after a call: the copy has views of its own, and trains apart."""
    model, call = made(kind)
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"):
        first = call(model, inputs())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(other, inputs()), first)
            with torch.no_grad():
                next(p for n, p in other.named_parameters() if n.endswith("q_proj.weight")).zero_()
            assert not torch.equal(call(other, inputs()), first)
            assert torch.equal(call(model, inputs()), first)


@interpreted
def test_compiles():
    model, call = made("idefics2")
    vlkernels.swap(model, strict=True)
    torch._dynamo.reset()
    with vlkernels.use_backend("triton"):
        want = call(model, inputs())
        compiled = torch.compile(lambda x: call(model, x), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(inputs()), want)


@interpreted
def test_idefics2_connector():
    """The connector whole: its modality projection and its resampler, beside stock."""
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    config = Idefics2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        perceiver_config={"hidden_size": 24, "resampler_n_latents": 5, "resampler_depth": 1, "resampler_n_heads": 4,
                          "resampler_head_dim": 6, "num_key_value_heads": 2},
        text_config={"model_type": "mistral", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Idefics2Connector(config)
    for p in model.parameters():
        p.data.normal_(std=0.2) if p.dim() > 1 else p.data.normal_(1.0, 0.3)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    x = inputs()[..., :16]
    usual, exact = model(x, mask), copy.deepcopy(model).double()(x.double(), mask)
    report = vlkernels.swap(model, strict=True)
    assert {e.path for e in report.entries if e.swapped} == {
        "modality_projection", "perceiver_resampler", "perceiver_resampler.layers.0.mlp"
    }  # fmt: skip
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = model(x, mask)
    assert counts["cross_attention_fwd_kernel"] and counts["mlp_projector_act_kernel"] == 2
    assert compare.beside("y", got, usual, exact).ok


@interpreted
def test_causal_kosmos2_stays_causal():
    """As transformers 5.17 has it: what that version computes, with the reason in the report."""
    model, call = made("kosmos2")
    model.x_attn.is_causal = True
    want = call(model, inputs())
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"):
        assert torch.equal(call(model, inputs()), want)
    assert "causal" in model.vlkernels_state()[1]


def test_kosmos2_eager_returns_weights():
    """Upstream's eager attention returns its weights; the swapped module leaves such a call to it."""
    model, _ = made("kosmos2")
    model.x_attn.config._attn_implementation = "eager"
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        _, weights = model(inputs())
    assert weights is not None and not counts
    assert "returns its weights" in model.vlkernels_state()[1]
