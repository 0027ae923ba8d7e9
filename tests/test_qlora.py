"""QLoRA: the op's 4-bit argument, the module and its state dict, the swap of peft's Linear4bit."""

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from vlkernels import lora_linear, use_backend
from vlkernels.modules import QLoRALinear, _quant_state
from vlkernels.ops import _nf4, _scratch
from vlkernels.ops.lora_linear import cases
from vlkernels.ops.lora_linear import triton as kernels
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS

KINDS = [("nf4", 64, True), ("fp4", 32, True), ("nf4", 128, False)]


@pytest.fixture(autouse=True)
def _empty_scratch():
    _scratch.release_scratch()


def plain(width=40, out=24, dtype=torch.float32, bias=True, device="cpu") -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, out, bias, device=device, dtype=dtype)


def trained(layer: QLoRALinear) -> QLoRALinear:
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.b, std=0.3)
    return layer


# -- the op --------------------------------------------------------------------------------------------------------


def packed_call(device="cpu", rows=6, K=24, N=20, R=4):
    g = torch.Generator().manual_seed(0)
    x, w, a, b = (torch.randn(*s, generator=g).to(device) for s in ((rows, K), (N, K), (R, K), (N, R)))
    weight, quant = _nf4.quantize(w)
    return {"x": x, "weight": weight, "a": a, "b": b, "quant": quant}


CHANGES = {
    "offset dropped": lambda parts: parts._replace(offset=parts.offset * 0),
    "codes of the next block": lambda parts: parts._replace(absmax=parts.absmax.roll(1)),
    "one code off": lambda parts: parts._replace(code=parts.code.roll(1)),
    "nested absmax halved": lambda parts: parts._replace(nested_absmax=parts.nested_absmax / 2),
}


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("change", [*CHANGES, "nibbles swapped", "another blocksize"])
def test_rule_notices(change, name, device):
    """Each part of a packed weight that goes wrong breaks the rule, in every dtype."""
    case = next(c for c in cases.CASES if c.name == "nf4-few-rows")
    blocks = _nf4.block_count((case["N"], case["K"]), 64)

    def edit(kw):
        if change == "nibbles swapped":
            return kw | {"weight": (kw["weight"] << 4) | (kw["weight"] >> 4)}
        if change == "another blocksize":
            short = _nf4.unpack_state(kw["quant"], blocks)
            absmax = short.absmax[: _nf4.block_count((case["N"], case["K"]), 128)]
            return kw | {"blocksize": 128, "quant": _nf4.pack_state(*short._replace(absmax=absmax))}
        return kw | {"quant": _nf4.pack_state(*CHANGES[change](_nf4.unpack_state(kw["quant"], blocks)))}

    found = compare.errors(lora_linear, case, PRECISIONS[name], "triton", device, change=edit)
    assert any(not e.ok for e in found if e.name == "y") and any(not e.ok for e in found if e.name == "dx")


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"blocksize": 48}, ValueError, "blocksize is 48; accepted: 32, 64"),
        ({"blocksize": 32}, ValueError, "quant has shape .* accepted for 15 blocks of 32"),
        ({"quant": None}, TypeError, "weight has dtype torch.uint8"),
        ({"quant": torch.zeros(10, dtype=torch.uint8)}, ValueError, r"quant has shape \(10,\); accepted for 8 blocks"),
        ({"quant": torch.zeros(1128)}, TypeError, "quant has dtype torch.float32"),
        ({"quant": [1]}, TypeError, "quant must be a torch.Tensor, got list"),
        ({"weight": torch.zeros(239, 1, dtype=torch.uint8)}, ValueError, r"\(239, 1\); accepted: .*\(240, 1\)"),
        ({"weight": torch.zeros(20, 24)}, TypeError, "weight has dtype torch.float32; accepted: torch.uint8"),
        ({"weight": torch.zeros(240, 2, dtype=torch.uint8)[:, :1]}, ValueError, "contiguous"),
        ({"weight": None}, ValueError, "either weight or base"),
        ({"weight": None, "base": torch.zeros(6, 20)}, ValueError, "quant belongs to a packed weight"),
        ({"quant_dtype": torch.int8}, TypeError, "quant_dtype is torch.int8"),
        ({"weight": torch.zeros(240, 1, dtype=torch.uint8, device="meta")}, ValueError, "one device"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_door(change, error, words):
    with pytest.raises(error, match=words):
        lora_linear(**(packed_call() | change))


def test_quant_needs_an_aligned_start():
    kw = packed_call()
    shifted = torch.cat((torch.zeros(3, dtype=torch.uint8), kw["quant"]))[3:]
    with pytest.raises(RuntimeError, match="storage_offset"):
        lora_linear(**(kw | {"quant": shifted}))


def test_packed_weight_gets_no_gradient(device):
    kw = packed_call(device)
    for name in ("x", "a", "b"):
        kw[name].requires_grad_()
    for backend in ("reference", "triton"):
        y = lora_linear(**kw, backend=backend)
        y.sum().backward()
        assert kw["weight"].grad is None and kw["x"].grad is not None


def test_which_kernels_run(device):
    """Up to 512 rows the weight is dequantised in the product; above, and for dx, in a pass of its own."""
    for rows, K, forward, both in ((512, 24, 0, 1), (513, 24, 1, 1), (8, 23, 1, 1)):
        kw = packed_call(device, rows, K)
        kw["x"].requires_grad_()
        _scratch.release_scratch()
        with meter.launches() as counts:
            y = lora_linear(**kw, backend="triton")
            assert counts["nf4_dequantize_kernel"] == forward and counts["nf4_linear_kernel"] == 1 - forward
            y.sum().backward()
        assert counts["nf4_dequantize_kernel"] == both
    # decoding is not left to the reference, which would write the whole weight out
    with torch.no_grad():
        values = lora_linear.values(**packed_call(device))
        assert kernels.declines(*values) is None
        dense = packed_call(device) | {"weight": torch.randn(20, 24, device=device), "quant": None}
        assert "decoding" in kernels.declines(*lora_linear.values(**dense))


@pytest.mark.parametrize("width", [24, 23])
def test_opcheck(width, device):
    """Schema, fake and autograd registrations hold with a packed weight."""
    kw = packed_call(device, K=width)
    for name in ("x", "a", "b"):
        kw[name].requires_grad_()
    values = lora_linear.reference.draw(*lora_linear.values(**kw))
    torch.library.opcheck(torch.ops.vlkernels.lora_linear.default, (*values, "triton"))


@pytest.mark.parametrize("rows", [7, 40])
@pytest.mark.parametrize("width", [24, 23])
def test_compiles(width, rows, device):
    """One full graph through the 4-bit arguments, the same numbers as uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = trained(QLoRALinear.from_plain(plain(width, 20, device=device), 4))
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(rows, width, device=device, requires_grad=True)
    with use_backend("triton"), meter.launches() as counts:
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        want = layer(x)
        (dx_want,) = torch.autograd.grad(want.square().sum(), x)
    assert counts["nf4_dequantize_kernel"] >= 1 and counter.frame_count == 1
    assert torch.equal(y, want) and torch.equal(dx, dx_want)


# -- the module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind, blocksize, double", KINDS)
def test_module_is_dequantise_then_lora(kind, blocksize, double, backend, device):
    base = plain(device=device)
    layer = trained(
        QLoRALinear.from_plain(base, 5, alpha=3, quant_type=kind, blocksize=blocksize, double=double, lora_bias=True)
    )
    layer.add_adapter("second", 2, alpha=8)
    layer.active = ("default", "second")
    trained(layer)
    assert layer.bias is base.bias and not layer.bias.requires_grad
    assert (layer.quant_type, layer.blocksize, layer.double) == (kind, blocksize, double)
    x = torch.randn(2, 3, 40, device=device, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)

    def dense(dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        out = nn.functional.linear(leaf, layer.dense_weight().to(dtype), layer.bias.to(dtype))
        for adapter in layer.adapters.values():
            branch = nn.functional.linear(leaf, adapter.a.to(dtype)) @ adapter.b.to(dtype).t()
            out = out + adapter.scale * (branch if adapter.bias is None else branch + adapter.bias.to(dtype))
        return out, torch.autograd.grad(out.square().sum(), leaf)[0]

    for name, got, usual, exact in zip(("y", "dx"), (y, dx), dense(torch.float32), dense(torch.float64), strict=True):
        error = compare.beside(name, got, usual, exact)
        assert error.ok, str(error)
    wide = layer.dense_weight().double() + sum(a.scale * a.b.double() @ a.a.double() for a in layer.adapters.values())
    usual = layer.dense_weight() + sum(a.scale * a.b @ a.a for a in layer.adapters.values())
    assert compare.beside("merged", layer.merged_weight(), usual, wide).ok


def test_module_without_an_active_adapter(device):
    layer = QLoRALinear.from_plain(plain(device=device), 4)
    x = torch.randn(3, 40, device=device)
    first = layer(x)
    torch.testing.assert_close(first, nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer.active = ()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_module_leaves_the_codes(dtype, device):
    layer = trained(QLoRALinear.from_plain(plain(device=device), 4))
    dense = layer.dense_weight()
    other = copy.deepcopy(layer).to(dtype)
    assert other.weight.dtype == other.quant.dtype == torch.uint8 and other.bias.dtype == dtype
    assert torch.equal(other.dense_weight(), dense) and other.weight.data_ptr() != layer.weight.data_ptr()
    assert other(torch.randn(3, 40, device=device, dtype=dtype)).dtype == dtype
    with torch.autocast(device, dtype):
        assert layer(torch.randn(3, 40, device=device)).dtype == dtype


def test_saved_bytes(device):
    """2R bytes a token in 16 bits, and with float32 adapters 4R; nothing of the weight."""
    for adapter_dtype, size in ((None, 2), (torch.float32, 4)):
        layer = QLoRALinear.from_plain(plain(dtype=torch.bfloat16, device=device), 4, adapter_dtype=adapter_dtype)
        x = torch.randn(32, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
        with use_backend("triton"):
            saved = meter.saved_bytes(lambda: layer(x), apart=(x, layer.weight, layer.quant))  # noqa: B023
        assert saved == 32 * 4 * size


def test_dropout_under_checkpointing(device):
    """The recomputation draws the mask of the first pass."""
    layer = trained(QLoRALinear.from_plain(plain(device=device), 4, dropout=0.4)).train()
    x = torch.randn(8, 40, device=device, requires_grad=True)
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(5)
        with use_backend("triton"):
            grads.append(torch.autograd.grad(wrap(layer, x).square().sum(), [x, layer.adapters["default"].a]))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_refusals():
    layer = QLoRALinear.from_plain(plain(), 4)
    with pytest.raises(RuntimeError, match="merged_weight"):
        layer.merge()
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()
    with pytest.raises(TypeError, match="m is a LayerNorm; accepted: nn.Linear"):
        QLoRALinear.from_plain(nn.LayerNorm(4), 4)
    with pytest.raises(TypeError, match="float64; accepted"):
        QLoRALinear.from_plain(plain().double(), 4)
    for options, words in (({"quant_type": "int4"}, "'int4'"), ({"blocksize": 100}, "blocksize is 100")):
        with pytest.raises(ValueError, match=words):
            QLoRALinear(8, 8, 2, **options)


# -- its state dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, blocksize, double", KINDS)
@pytest.mark.parametrize("shape", [(40, 24), (33, 7)])
def test_state_dict_round_trip(shape, kind, blocksize, double):
    """A layer of another kind takes over codes, facts and numbers; the bytes come back as they were."""
    layer = trained(
        QLoRALinear.from_plain(plain(*shape, torch.bfloat16), 3, quant_type=kind, blocksize=blocksize, double=double)
    )
    state = layer.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if double else []
    header = f"weight.quant_state.bitsandbytes__{kind}"
    assert list(state) == [
        "bias", "weight", "weight.absmax", "weight.quant_map", *nested, header,
        "adapters.default.a", "adapters.default.b",
    ]  # fmt: skip
    for strict in (True, False):
        other = QLoRALinear(*shape, 3, dtype=torch.bfloat16)
        assert str(other.load_state_dict(copy.deepcopy(state), strict=strict)) == "<All keys matched successfully>"
        assert (other.quant_type, other.blocksize, other.double) == (kind, blocksize, double)
        assert torch.equal(other.dense_weight(), layer.dense_weight())
        again = other.state_dict()
        assert list(again) == list(state) and all(torch.equal(again[k], state[k]) for k in state)


def test_upstreams_state_dict():
    """What bitsandbytes saves loads here, what is saved here loads there, and the bytes are the same."""
    bnb = pytest.importorskip("bitsandbytes")
    for kind, double in (("nf4", True), ("nf4", False), ("fp4", True)):
        base = plain(64, 48, torch.bfloat16)
        theirs = bnb.nn.Linear4bit(64, 48, compress_statistics=double, quant_type=kind)
        theirs.load_state_dict(base.state_dict())
        theirs = theirs.to(torch.bfloat16).to("cpu")
        saved = theirs.state_dict()
        ours = QLoRALinear.from_plain(base, 2, quant_type=kind, double=double)
        own = {k: v for k, v in ours.state_dict().items() if not k.startswith("adapters.")}
        assert sorted(own) == sorted(saved)
        assert all(torch.equal(own[key], saved[key]) and own[key].dtype == saved[key].dtype for key in own)
        other = QLoRALinear(64, 48, 2, dtype=torch.bfloat16)
        assert not other.load_state_dict(saved, strict=False).unexpected_keys
        assert torch.equal(other.dense_weight(), ours.dense_weight())
        parts = {k.removeprefix("weight."): v for k, v in own.items() if k.startswith("weight.")}
        back = bnb.nn.Params4bit.from_prequantized(own["weight"], parts, device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(back, back.quant_state), ours.dense_weight())


def test_adapters_alone_load():
    layer = trained(QLoRALinear.from_plain(plain(), 3))
    state = {k: v + 1 for k, v in layer.state_dict().items() if k.startswith("adapters.")}
    missing = layer.load_state_dict(state, strict=False).missing_keys
    assert "weight" in missing and torch.equal(layer.adapters["default"].a, state["adapters.default.a"])
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight.absmax"'):
        layer.load_state_dict(state)


def test_quant_storage_of_another_dtype_and_filling_are_read():
    layer = QLoRALinear.from_plain(plain(40, 24), 3)
    state = layer.state_dict()
    state["weight"] = state["weight"].flatten().view(torch.float16)[:, None]
    other = QLoRALinear(40, 24, 3)
    other.load_state_dict(state)
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    # the half byte that fills up an odd count is no weight
    layer = QLoRALinear.from_plain(plain(7, 5), 3)
    state = layer.state_dict()
    state["weight"][-1] ^= 5
    other = QLoRALinear(7, 5, 3)
    other.load_state_dict(state)
    assert torch.equal(other.dense_weight(), layer.dense_weight())


HEADER = "weight.quant_state.bitsandbytes__nf4"


def header(**changes):
    def change(state):
        fields = json.loads(bytes(state[HEADER].tolist()))
        fields = {k: v for k, v in (fields | changes).items() if v != "missing"}
        state[HEADER] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return change


def key(name, value):
    def change(state):
        if value is None:
            del state[name]
        else:
            state[name] = value(state[name])

    return change


def moved(old, new):
    def change(state):
        state[new] = state.pop(old)

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (key(HEADER, lambda t: t[:-3]), "holds no JSON"),
        (key(HEADER, lambda t: t.flip(0)), "holds no JSON"),
        (key(HEADER, lambda t: torch.tensor([0xFF, 0xFE], dtype=torch.uint8)), "holds no JSON"),
        (key(HEADER, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)), "no JSON object"),
        (key(HEADER, lambda t: t.int()), "torch.int32"),
        (key(HEADER, None), "0 of weight.quant_state"),
        (moved(HEADER, "weight.quant_state.bitsandbytes__fp4"), "says quant_type 'nf4'; its name says 'fp4'"),
        (moved(HEADER, "weight.quant_state.bitsandbytes__int4"), "unknown kind"),
        (header(quant_type="af4"), "says quant_type 'af4'"),
        (header(blocksize=96), "blocksize is 96; accepted: 32, 64"),
        (header(blocksize=32), "absmax is torch.uint8 .* accepted: torch.uint8"),
        (header(blocksize="64"), "blocksize is '64'"),
        (header(blocksize="missing"), "blocksize is None"),
        (header(dtype="int8"), "dtype is 'int8'; accepted: float32, bfloat16, float16"),
        (header(shape=[40, 24]), r"the weight is \(40, 24\), the layer's is \(24, 40\)"),
        (header(shape=[960]), r"shape of the weight is \(960,\)"),
        (header(shape=[24, 41]), "weight holds 480 bytes; a weight .* has 492"),
        (header(shape=[24, -40]), "both positive"),
        (header(nested_blocksize=128), "nested_blocksize is 128; accepted: 256"),
        (header(nested_dtype="float16"), "nested_dtype is 'float16'"),
        (header(nested_offset="missing"), "nested_offset is None"),
        (header(nested_offset=float("nan")), "nested_offset is nan"),
        (key("weight.absmax", None), "weight.absmax is missing"),
        (key("weight.absmax", lambda t: t[:-1]), r"weight.absmax is torch.uint8 \(14,\)"),
        (key("weight.absmax", lambda t: t.float()), "weight.absmax is torch.float32"),
        (key("weight.quant_map", lambda t: t.flip(0)), "not the code book of nf4"),
        (key("weight.quant_map", lambda t: t[:8]), r"weight.quant_map is torch.float32 \(8,\)"),
        (key("weight.nested_absmax", lambda t: t.repeat(2)), "weight.nested_absmax"),
        (key("weight.nested_absmax", None), "unknown key weight.nested_quant_map"),
        (key("weight.nested_quant_map", None), "weight.nested_quant_map is missing"),
        (key("weight", lambda t: t[:-1]), "weight holds 479 bytes"),
        (key("weight", None), "weight is missing"),
        (moved("weight.absmax", "weight.scales"), "weight.absmax is missing"),
    ],
)
def test_a_corrupt_state_dict_is_an_error_and_changes_no_weight(change, words):
    layer = QLoRALinear.from_plain(plain(), 3)
    state = layer.state_dict()
    change(state)
    torch.manual_seed(9)
    other = QLoRALinear(40, 24, 3)
    before = other.dense_weight()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=words):
            other.load_state_dict(state, strict=strict)
        assert torch.equal(other.dense_weight(), before)


def test_a_plain_weight_is_an_error():
    with pytest.raises(RuntimeError, match="no quant state beside it; from_plain"):
        QLoRALinear(40, 24, 3).load_state_dict(plain().state_dict(), strict=False)
    assert set(_quant_state.Facts._fields) == {"shape", "quant_type", "blocksize", "dtype"}
