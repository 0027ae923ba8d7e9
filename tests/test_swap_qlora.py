"""Swapping peft's LoRA layers over bitsandbytes' 4-bit linear: stock's numbers, and nothing else changes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

import vlkernels  # noqa: E402
from vlkernels import backends, use_backend  # noqa: E402
from vlkernels.ops import _scratch  # noqa: E402
from vlkernels.testing import compare, meter  # noqa: E402

# compute dtype of the base, dtype of x, of the adapters, autocast
PRECISIONS = {
    "fp32": (torch.float32, torch.float32, torch.float32, None),
    "compute dtype not set": (None, torch.float32, torch.float32, None),
    "bf16 over fp32 adapters": (torch.bfloat16, torch.bfloat16, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    "fp16 over fp32 adapters": (torch.float16, torch.float16, torch.float32, None),
    "autocast": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "autocast, x in fp32": (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
}


class Net(nn.Module):
    """nf4 with double quantisation, fp4 without, nf4 without a bias. bitsandbytes' compiled CPU code is wrong where a
    block crosses rows, so widths are multiples of 64."""

    is_loaded_in_4bit = True

    def __init__(self, compute):
        super().__init__()
        options = {"compute_dtype": compute}
        self.up = bnb.nn.Linear4bit(64, 128, quant_type="nf4", **options)
        self.mid = bnb.nn.LinearFP4(128, 192, compress_statistics=False, **options)
        self.down = bnb.nn.LinearNF4(192, 64, bias=False, **options)

    def forward(self, x):
        # smooth: an error that moves a sign would be one of the kink
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def model_of(compute=torch.float32, dtype=torch.float32, adapter=torch.float32, **options):
    torch.manual_seed(0)
    net = Net(compute).to(dtype).to("cpu")
    config = peft.LoraConfig(r=6, target_modules=["up", "mid", "down"], init_lora_weights=False, **options)
    model = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return model


def layers(model):
    return [m for m in model.modules() if "lora_A" in m._modules]


def step(model, x, autocast=None, backend=None):
    """(outputs and gradients by name, ops that ran)"""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with (
        use_backend(backend),
        backends.record() as ran,
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        y = model(x)
    y.float().square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ran


def exact_step(model, x):
    """The same in float64, with the weights that bitsandbytes dequantises."""
    exact = nn.Module()
    parameters = {}

    def layer(m, name):
        base, compute = m.base_layer, m.base_layer.compute_dtype or x.dtype
        state = base.weight.quant_state
        weight = bnb.functional.dequantize_4bit(base.weight, state).to(compute).double()
        bias = None if base.bias is None else base.bias.double()
        pairs = []
        for adapter in (n for n in m.active_adapters if n in m.lora_A):
            a, b = (getattr(m, f"lora_{k}")[adapter].weight.detach().double().requires_grad_() for k in "AB")
            prefix = f"base_model.model.{name}.lora_"
            parameters.update({f"{prefix}A.{adapter}.weight": a, f"{prefix}B.{adapter}.weight": b})
            pairs.append((m.scaling[adapter], a, b))
        return lambda t: nn.functional.linear(t, weight, bias) + sum(s * (t @ a.t() @ b.t()) for s, a, b in pairs)

    exact.up, exact.mid, exact.down = (layer(getattr(model.base_model.model, n), n) for n in ("up", "mid", "down"))
    x = x.double().requires_grad_()
    y = Net.forward(exact, x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in parameters.items()}


@pytest.mark.parametrize(
    "name, rows", [*((name, 5) for name in PRECISIONS), ("bf16 over fp32 adapters", 514), ("autocast", 514)]
)
def test_equal_to_stock_within_the_rule(name, rows):
    """Against float64, beside the error of stock peft and bitsandbytes in the same dtypes."""
    compute, dtype, adapter, autocast = PRECISIONS[name]
    model = model_of(compute, dtype, adapter)
    stock = copy.deepcopy(model)
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    assert len(vlkernels.swap(model)) == 3
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    usual, _ = step(stock, x, autocast)
    got, ran = step(model, x, autocast, "triton")
    exact = exact_step(model, x)
    assert ran == [("lora_linear", "triton")] * 3
    assert got.keys() == usual.keys() == exact.keys()
    low = autocast or dtype
    for key in got:
        error = compare.beside(key, got[key], usual[key], exact[key], low if low != torch.float32 else None)
        assert error.ok, str(error)
    assert layers(model)[0].base_layer.compute_dtype == layers(stock)[0].base_layer.compute_dtype
    now = model.state_dict()
    assert list(now) == list(keys) and all(torch.equal(now[k], keys[k]) for k in keys)


def test_on_the_reference_it_is_stock_bit_for_bit():
    model = model_of()
    stock = copy.deepcopy(model)
    vlkernels.swap(model)
    x = torch.randn(5, 64)
    usual, _ = step(stock, x)
    got, _ = step(model, x, backend="reference")
    assert all(torch.equal(got[k], usual[k]) for k in usual)


def test_report_and_unswap():
    model = model_of(torch.bfloat16, torch.bfloat16)
    classes = [type(m) for m in layers(model)]
    before = [set(vars(m)) for m in layers(model)]
    report = vlkernels.swap(model)
    with use_backend("triton"):
        assert "3 modules swapped, 0 left" in str(report) and "Linear4bit x 3 -> triton" in str(report)
    step(model, torch.randn(4, 64).bfloat16(), backend="triton")
    assert all("vlkernels_fused=True" in repr(m) for m in layers(model))
    assert all(isinstance(m, cls) for m, cls in zip(layers(model), classes, strict=True))
    assert vlkernels.unswap(model) == 3
    assert [type(m) for m in layers(model)] == classes and [set(vars(m)) for m in layers(model)] == before


def reasons(model):
    return {entry.reason for entry in vlkernels.swap(model).entries}


def test_what_goes_to_stock():
    """Calls that the fused path does not cover run peft's forward, and the report says why."""
    x = torch.randn(4, 64)
    for change, words in (
        (lambda m: m.disable_adapter_layers(), "adapters are disabled"),
        (lambda m: m.base_model.model.up.base_layer.register_forward_hook(lambda *_: None), "carries hooks"),
        (lambda m: setattr(m.base_model.model.up.base_layer.weight.quant_state, "blocksize", 48), "blocksize is 48"),
        (lambda m: setattr(m.base_model.model.up.base_layer.weight.quant_state.state2, "blocksize", 128), "of 128"),
        (lambda m: setattr(m.base_model.model.up.base_layer.weight.quant_state, "shape", (128, 32)), r"absmax is"),
        (lambda m: setattr(m.base_model.model.up.base_layer.weight, "quant_state", None), "not quantised yet"),
        (lambda m: m.base_model.model.up.lora_A["default"].register_forward_hook(lambda *_: None), "carries hooks"),
    ):
        model = model_of()
        change(model)
        assert any(words in reason for reason in reasons(model)), (words, reasons(model))
    model = model_of(use_dora=True)
    assert any("DoraLinearVariant" in reason for reason in reasons(model))
    # compute dtype and x differ, without autocast
    model = model_of(torch.bfloat16)
    stock = copy.deepcopy(model)
    vlkernels.swap(model)
    usual, _ = step(stock, x)
    got, ran = step(model, x, backend="triton")
    assert ran == [] and all(torch.equal(got[k], usual[k]) for k in usual)


def test_two_adapters_and_dropout():
    model = model_of()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    stock = copy.deepcopy(model)
    vlkernels.swap(model)
    x = torch.randn(4, 64)
    usual, _ = step(stock, x)
    got, ran = step(model, x, backend="triton")
    exact = exact_step(model, x)
    assert len(ran) == 5 and got.keys() == usual.keys() == exact.keys()
    for key in got:
        error = compare.beside(key, got[key], usual[key], exact[key])
        assert error.ok, str(error)
    model = model_of(lora_dropout=0.5)
    vlkernels.swap(model)
    for mode in (model.train(), model.eval()):
        with use_backend("triton"):
            first, second = model(x), model(x)
        assert torch.equal(first, second) != mode.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_dequantises_once(reentrant):
    model = model_of()
    vlkernels.swap(model)
    layer = model.base_model.model.up
    x = torch.randn(513, 64, requires_grad=True)
    with use_backend("triton"):
        (want,) = torch.autograd.grad(layer(x).square().sum(), x)
        _scratch.release_scratch()
        with meter.launches() as counts:
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert counts["nf4_dequantize_kernel"] == 1
    assert torch.equal(x.grad, want)


def test_copies_pickles_and_changes_are_never_stale():
    """The quant tensor beside the weight is neither copied nor saved, and follows the quant state."""
    model = model_of()
    vlkernels.swap(model)
    x = torch.randn(4, 64)
    want, _ = step(model, x, backend="triton")
    layer = model.base_model.model.up
    assert layer._vlkernels_cache.quant is not None
    assert copy.deepcopy(layer)._vlkernels_cache.quant is None
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False)._vlkernels_cache.quant is None
    twin, _ = step(copy.deepcopy(model), x, backend="triton")
    assert all(torch.equal(twin[k], want[k]) for k in want)
    # absmax written in place, absmax replaced, codes replaced, codes written in place: each is seen
    state, weight = layer.base_layer.weight.quant_state, layer.base_layer.weight
    changes = (
        lambda: state.offset.mul_(1.5),
        lambda: setattr(state, "absmax", state.absmax.roll(1)),
        lambda: setattr(weight, "data", weight.data.roll(3)),
        lambda: weight.copy_(weight.roll(5)),
    )
    for change in changes:
        before, _ = step(model, x, backend="triton")
        with torch.no_grad():
            change()
        got, _ = step(model, x, backend="triton")
        usual, _ = step(model, x, backend="reference")
        assert not torch.equal(got["y"], before["y"])
        torch.testing.assert_close(got["y"], usual["y"])


def test_compiles():
    """One full graph through a swapped layer, the numbers of the uncompiled one."""
    torch._dynamo.reset()
    model = model_of()
    vlkernels.swap(model)
    layer = model.base_model.model.up
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(6, 64, requires_grad=True)
    with use_backend("triton"):
        want = layer(x)
        (dx_want,) = torch.autograd.grad(want.square().sum(), x)
        with meter.launches() as counts:
            y = compiled(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
            compiled(torch.randn(6, 64, requires_grad=True))
    assert counter.frame_count == 1 and counts["nf4_linear_kernel"] == 2
    assert torch.equal(y, want) and torch.equal(dx, dx_want)


def test_eight_bit_is_left():
    from vlkernels.integrations.swap import registry

    targets, left = registry()
    assert "8-bit" in left["peft.tuners.lora.bnb:Linear8bitLt"]
    assert "peft.tuners.lora.bnb:Linear4bit" in targets
