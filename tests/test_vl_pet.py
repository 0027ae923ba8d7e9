"""VL-PET: the four gates in BART's encoder, T5's form, the decoder's value-parallel adapter."""

import pytest
import torch
import torch.nn.functional as F
from equations import (
    Variant,
    attention,
    check_checkpointing,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    layer_norm,
    lin,
    on_triton,
    randomised,
    same_in_float64,
)
from own_goldens import both, passes, write
from torch import nn

from vlkernels.modules import VLPETAdapter, VLPETDecoderLayer, VLPETEncoderLayer, VLPETT5EncoderLayer
from vlkernels.testing import compare

pytestmark = pytest.mark.usefixtures("on_the_reference")
D, OP = 16, ("bottleneck_adapter",)
HEADS, GATE_R = 2, 3


def act(t):
    return F.gelu(t, approximate="tanh")


def pet(p, s, h, x, gate, scale):
    """G M of one sub-layer, upstream's names."""
    down = torch.cat([lin(p, f"{s}_adapter_multihead_down.{j}", h) for j in range(HEADS)], -1)
    m = h + lin(p, f"{s}_adapter_multihead_up", act(down))
    g = f"encoder_{s}_adapter_gating_"
    if gate == "large":
        G = lin(p, f"{g}large_x_up", act(lin(p, f"{g}large_x_down", x))).sigmoid()
    elif gate == "middleX":
        G = lin(p, f"{g}middle_xy_add", x + m).sigmoid()
    elif gate == "middleY":
        G = 1 + p[f"{g}middle_ia3_add"]
    else:
        G = lin(p, f"{g}small_xy_cat", torch.cat((x, m), -1)).sigmoid().mean(1, keepdim=True)
    return scale * G * m


def bart(gate, scale):
    def equation(p, x, mask):
        q, k, v = (lin(p, f"self_attn.{n}_proj", x) for n in "qkv")
        h = lin(p, "self_attn.out_proj", attention(q, k, v, 2, added=mask))
        x = layer_norm(p, "self_attn_layer_norm", x + pet(p, "attn", h, x, gate, scale))
        h = lin(p, "fc2", F.gelu(lin(p, "fc1", x)))
        return layer_norm(p, "final_layer_norm", x + pet(p, "ff", h, x, gate, scale))

    return equation


def padding():
    mask = torch.zeros(2, 1, 5, 5)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    return torch.randn(2, 5, D), mask


PET = {
    gate: Variant("adapter.vl_pet", lambda gate=gate, scale=scale: VLPETEncoderLayer(
        D, 2, 21, r=6, heads=HEADS, gate=gate, gate_r=GATE_R, scale=scale), bart(gate, scale), padding, OP)
    for gate, scale in (("large", 1.0), ("middleX", 0.3), ("middleY", 1.0), ("small", 0.7))
}  # fmt: skip


@pytest.mark.parametrize("gate", PET)
def test_vl_pet(gate):
    check_identity(PET[gate])
    check_names(PET[gate])
    check_checkpointing(PET[gate], training=True)


@on_triton
@pytest.mark.parametrize("gate", ["large", "small"])
def test_vl_pets_rule(gate, device):
    check_rule(PET[gate], "triton", device, torch.bfloat16)


@on_triton
@pytest.mark.parametrize("gate", ["large", "middleY"])
def test_vl_pets_graph(gate, device):
    torch._dynamo.reset()
    check_one_graph(PET[gate], "triton", device)


@pytest.mark.parametrize("gate", ["large", "small"])
def test_vl_pets_children(gate):
    """Hooks on every child, with the numbers of the op."""
    adapter = randomised(VLPETAdapter(D, 6, HEADS, gate=gate, gate_r=GATE_R)).double()
    h, r, seen = torch.randn(2, 5, D).double(), torch.randn(2, 5, D).double(), set()
    want = adapter(h, r).detach()
    linears = {n: m for n, m in adapter.named_modules() if isinstance(m, nn.Linear)}
    for name, child in linears.items():
        child.register_forward_hook(lambda m, a, y, name=name: seen.add(name))
    got = adapter(h, r).detach()
    assert seen == set(linears)
    assert float((got - want).abs().max()) <= 64 * compare.ulp(float(want.abs().max()), torch.float64)


def test_t5s_form():
    """x + 0.3 G M(f(RMSNorm(x))), the gate of x itself; M(h) is h at the start."""
    layer = randomised(VLPETT5EncoderLayer(D, 2, 21, d_kv=6, r=6, heads=HEADS, gate_r=GATE_R)).double()
    x, bias = torch.randn(2, 5, D).double(), torch.randn(1, 2, 5, 5).double()
    names = {"multihead": "{}_adapter_multihead", "gating": "encoder_{}_adapter_gating"}
    p = {}
    for n, t in layer.named_parameters():
        s, _, rest = n.partition("_adapter.")
        word = rest.partition("_")[0]
        p[names[word].format(s) + rest.removeprefix(word) if rest else n] = t
    rms = lambda t, w: t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w  # noqa: E731
    n = rms(x, p["layer.0.layer_norm.weight"])
    q, k, v = (lin(p, f"layer.0.SelfAttention.{w}", n) for w in "qkv")
    h = x + pet(p, "attn", lin(p, "layer.0.SelfAttention.o", attention(q, k, v, 2, 1.0, bias)), x, "large", 0.3)
    n = rms(h, p["layer.1.layer_norm.weight"])
    ff = lin(p, "layer.1.DenseReluDense.wo", lin(p, "layer.1.DenseReluDense.wi", n).relu())
    want = h + pet(p, "ff", ff, h, "large", 0.3)
    same_in_float64({"y": layer(x, bias).detach()}, {"y": want.detach()})
    fresh = VLPETT5EncoderLayer(D, 2, 21)
    assert 0.01 < float(VLPETAdapter(400, 8, gate="middleY").gating_middle_ia3_add.detach().std()) < 0.03
    assert fresh.attn_adapter.scale == 0.3 and fresh.ff_adapter.multihead_up.weight.shape == (D, 192)
    assert not any(t.any() for t in fresh.ff_adapter.multihead_up.parameters())


def test_the_decoders_cache_holds_adapted_values():
    layer = randomised(VLPETDecoderLayer(D, 2, 21, r=5, tasks=("vqa", "gqa"))).double()
    x, enc = torch.randn(2, 6, D).double(), torch.randn(2, 4, D).double()
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[1, ..., 2:] = False
    want, past, rows = layer(x, enc, encoder_attention_mask=mask), (), []
    for begin, end in ((0, 3), (3, 5), (5, 6)):
        y, past = layer(x[:, begin:end], None if past else enc, encoder_attention_mask=mask, past=past)
        rows.append(y)
    same_in_float64({"y": torch.cat(rows, 1).detach()}, {"y": want.detach()})
    a = layer.encoder_attn.attn_value_parallel_adapter.adapters["gqa"]
    v = layer.encoder_attn.v_proj(enc) + a(enc)
    same_in_float64({"v": past[3].transpose(1, 2).flatten(2).detach()}, {"v": v.detach()})
    with pytest.raises(ValueError, match="enc is None; accepted: the encoder's output"):
        layer(x)


def test_vl_pets_fixed_factor(tmp_path):
    linears = {f"self_attn.{n}_proj": (D, D) for n in ("q", "k", "v", "out")} | {"fc1": (21, D), "fc2": (D, 21)}
    for s in ("attn", "ff"):
        linears |= {f"{s}_adapter_multihead_down.{j}": (3, D) for j in range(HEADS)} | {
            f"{s}_adapter_multihead_up": (D, 6)
        }
    shapes = {k: t for n, (o, i) in linears.items() for k, t in both(n, o, i).items()}
    shapes |= {f"{n}_layer_norm.{w}": (D,) for n in ("self_attn", "final") for w in ("weight", "bias")}
    shapes |= {f"encoder_{s}_adapter_gating_middle_ia3_add": (D,) for s in ("attn", "ff")}
    hp = {"d": D, "attn_heads": 2, "ff": 21, "r": 6, "heads": 2, "gate": "middleY", "gating_scaling": 0.3}
    inputs = {"x": (2, 5, D), "attention_mask": (2, 1, 5, 5)}
    write(tmp_path, "adapter.vl_pet", hp, shapes, inputs, bart("middleY", 0.3))
    passes(tmp_path)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: VLPETAdapter(D, gate="tiny"), "gate is 'tiny'; accepted: large, middleX, middleY, small"),
        (lambda: VLPETAdapter(D, 6, 4), "r is 6 with 4 heads; accepted: a multiple"),
        (lambda: VLPETAdapter(D, gate_r=0), "gate_r is 0; accepted: 1 or more"),
        (lambda: VLPETAdapter(D, gate="small")(*torch.zeros(2, 5, D)), r"accepted with the small gate: \(B, n"),
        (lambda: VLPETAdapter(D)(torch.zeros(2, 5, D)), "residual is None; accepted by this VLPETAdapter"),
        (lambda: VLPETEncoderLayer(D, 2, 8)(torch.zeros(2, 5, 4)), r"x has shape \(2, 5, 4\); accepted"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()
