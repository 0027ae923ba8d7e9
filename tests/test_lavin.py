"""LaVIN's adapters: upstream's equations, the start, grouped convolutions, the layer, the modality token."""

import pytest
import torch
import torch.nn.functional as F
from equations import (
    Variant,
    check_checkpointing,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    lin,
    on_triton,
    randomised,
)
from own_goldens import passes, write
from torch import nn

from vlkernels import backends
from vlkernels.modules import LaVINBlock, LaVINModality, RepAdapter, RepAdapterRouter, lavin_mask
from vlkernels.modules.llama_adapter import interleaved_rotary
from vlkernels.testing import compare

pytestmark = pytest.mark.usefixtures("on_the_reference")
D, OP = 20, ("bottleneck_adapter",)


def tokens():
    return (torch.randn(3, 5, D),)


def conv(p, name, x, groups=1):
    return F.conv1d(x, p[f"{name}.weight"], p[f"{name}.bias"], groups=groups)


def lavin(scale, t, groups, route=True):
    def equation(p, x, w=None):
        if w is None and route:
            w = (lin(p, "expert_weights", x[:, 0]) / t).softmax(-1).half()
        a = conv(p, "conv_A", x.transpose(1, 2))
        if not route:
            return conv(p, "conv_B", a, groups).transpose(1, 2)
        y = conv(p, "conv_B", a, groups) * scale * w[:, 0, None, None]
        y = y + conv(p, "conv_D", a, groups) * scale * w[:, 1, None, None]
        return y.transpose(1, 2) + x

    return equation


class Given(RepAdapterRouter):
    """Called with the weights that the file has."""

    def forward(self, x, w):
        return super().forward(x, weights=w)


def given():
    adapter = Given(D, 8, groups=4, scale=2)
    adapter.expert_weights.requires_grad_(False)
    return adapter


CASES = {
    "router": Variant("adapter.lavin", lambda: RepAdapterRouter(D, 6, scale=0.5, t=3.0), lavin(0.5, 3.0, 2),
                            tokens, OP),
    "given weights": Variant(
        "adapter.lavin", given, lavin(2, 10.0, 4),
        lambda: (torch.randn(3, 5, D), torch.rand(3, 2) + 0.1), OP,
    ),
    "rep": Variant("adapter.lavin_rep", lambda: RepAdapter(D, 6), lavin(1, 1, 2, route=False), tokens, OP),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equation(name):
    check_identity(CASES[name])
    check_names(CASES[name])
    check_copies(CASES[name])


@on_triton
@pytest.mark.parametrize("name, autocast", [("given weights", None), ("given weights", torch.bfloat16), ("rep", None)])
def test_rule(name, autocast, device):
    check_rule(CASES[name], "triton", device, autocast)


@on_triton
@pytest.mark.parametrize("name", ["router", "rep"])
def test_one_graph_and_checkpointing(name, device):
    torch._dynamo.reset()
    check_one_graph(CASES[name], "triton", device)
    check_checkpointing(CASES[name], training=True)


@pytest.mark.parametrize("make", [lambda: RepAdapterRouter(D, 6), lambda: RepAdapter(D, 6)], ids=["router", "rep"])
def test_a_changed_convolution_acts(make):
    adapter, x, seen = randomised(make()).double().eval(), torch.randn(2, 3, D).double(), []
    want, w = adapter(x).detach(), {"weights": torch.rand(2, 2).double()} if hasattr(adapter, "conv_D") else {}
    want = adapter(x, **w).detach()
    for name, child in adapter.named_children():
        if isinstance(child, nn.Conv1d):
            child.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    with backends.record() as calls:
        got = adapter(x, **w)
    assert not calls and seen == [n for n, m in adapter.named_children() if isinstance(m, nn.Conv1d)]
    assert float((got - want).abs().max()) <= 64 * compare.ulp(float(want.abs().max()), torch.float64)
    adapter.train()
    assert not torch.equal(adapter(x, **w), got)  # dropout


# -- LaVIN's layer -------------------------------------------------------------------------------------------------


def block(**options):
    torch.manual_seed(3)
    return randomised(LaVINBlock(24, 2, 40, r=4, **options)).double().eval()


@pytest.mark.parametrize("mode", ["attn", "block"])
def test_the_block_generates_with_the_prompts_weights(mode):
    """Token by token the routers' weights are the prompt's, and so are the numbers those of the whole sequence."""
    module, x = block(mode=mode), torch.randn(2, 7, 24).double()
    cos, sin = interleaved_rotary(7, 12)
    want = module(x, cos, sin, lavin_mask(7))
    y, past = module(x[:, :4], cos[:4], sin[:4], lavin_mask(4), use_cache=True)
    rows = [y]
    for i in range(4, 7):
        y, past = module(x[:, i : i + 1], cos[i : i + 1], sin[i : i + 1], lavin_mask(1, i), past)
        rows.append(y)
    assert past.k.shape == (2, 7, 2, 12) and len(past.weights) == 1 + (mode == "block")
    difference = float((torch.cat(rows, 1) - want).detach().abs().max())
    assert difference <= 64 * compare.ulp(float(want.detach().abs().max()), torch.float64)


def test_the_block_by_hand_and_at_the_start():
    module, x = block(mode="block"), torch.randn(2, 5, 24).double()
    rotation = interleaved_rotary(5, 12)
    n = module.adapter_attn(module.attention_norm(x))
    h = x + module.attention(n, *rotation, lavin_mask(5))
    want = h + module.feed_forward(module.adapter_mlp(module.ffn_norm(h)))
    assert torch.equal(module(x, *rotation, lavin_mask(5)), want)
    for adapter in (module.adapter_attn, module.adapter_mlp):
        for conv in (adapter.conv_B, adapter.conv_D):
            nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    h = x + module.attention(module.attention_norm(x), *rotation)
    assert torch.equal(module(x, *rotation), h + module.feed_forward(module.ffn_norm(h)))
    with pytest.raises(ValueError, match="mode is 'all'; accepted: attn, block"):
        LaVINBlock(24, 2, 40, mode="all")


def test_the_modality_token():
    m, h, image = LaVINModality(6), torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    labels = torch.arange(1, 9).view(2, 4)
    y, marks = m(h, torch.tensor([1, 0]), image, labels)
    token = m.adapter_modality_embedding.weight
    assert torch.equal(y[0], torch.cat((token[1:], h[0, :1], image[0], h[0, 1:])))
    assert torch.equal(y[1], torch.cat((token[:1], h[1], torch.zeros(3, 6))))
    assert marks.tolist() == [[0, 1, 0, 0, 0, 2, 3, 4], [0, 5, 6, 7, 8, 0, 0, 0]]
    assert torch.equal(m(h, torch.tensor([False, True])), torch.cat((token[:, None], h), 1))
    assert lavin_mask(4).tolist() == [[True, False, False, False], [False, True, False, False],
                                      [False, True, True, False], [False, True, True, True]]  # fmt: skip
    assert torch.equal(lavin_mask(2, 2), lavin_mask(4)[2:])
    for words, says in (
        (
            {"has_image": torch.ones(3, dtype=torch.long)},
            r"has_image is torch.int64 \(3,\); accepted: bool or integers \(2,",
        ),
        ({"image": image[:1]}, r"image has shape \(1, 3, 6\); accepted: \(2, N, 6\)"),
        ({"labels": labels[:, :2]}, r"labels has shape \(2, 2\); accepted: \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=says):
            m(h, **({"has_image": torch.tensor([1, 0])} | words))


# -- a file of another setting -------------------------------------------------------------------------------------


def test_a_file_of_the_plain_adapter(tmp_path):
    shapes = {"conv_A.weight": (6, D, 1), "conv_A.bias": (6,), "conv_B.weight": (D, 3, 1), "conv_B.bias": (D,)}
    hp = {"router": False, "d": D, "r": 6, "groups": 2, "scale": 1}
    write(tmp_path, "adapter.lavin_rep", hp, shapes, {"x": (2, 3, D)}, lavin(1, 1, 2, route=False))
    passes(tmp_path)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x: RepAdapter(D, 5), "width 20, r 5, groups 2; accepted: a divisor of both"),
        (lambda x: RepAdapterRouter(D, t=0), "t is 0; accepted: a temperature above 0"),
        (lambda x: RepAdapter(D)(x[0]), r"hidden has shape \(5, 20\); accepted: \(B, L, 20\)"),
        (lambda x: RepAdapterRouter(D)(x, weights=torch.ones(3, 3)), r"weights has shape \(3, 3\); accepted: \(B, 2\)"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(*tokens())
