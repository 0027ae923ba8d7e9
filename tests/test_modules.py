"""LoRALinear."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import BackendRefused, backends, use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import LoRALinear
from vlkernels.ops._dropout import draw_seed, dropout
from vlkernels.testing.compare import ulp

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
PLAIN = ["linear", "linear without bias", "conv1d"]


class Conv1D(nn.Module):
    """As transformers': weight (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def plain(kind: str, K: int = 20, N: int = 28, device: str = "cpu") -> nn.Module:
    return (Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=kind == "linear")).to(device)


def trained(layer: LoRALinear) -> LoRALinear:
    """Every adapter parameter random: a fresh b hides all errors of the branch."""
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_(std=0.4)
    return layer


def equation(layer: LoRALinear, x, dtype=torch.float64):
    """y = x Wᵀ + bias + Σ scale (x Aᵀ Bᵀ + lora_bias), without dropout, from the layer's numbers in `dtype`."""
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    y = F.linear(x.to(dtype), weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    for name in layer.active:
        adapter = layer.adapters[name]
        bias = None if adapter.bias is None else adapter.bias.to(dtype)
        y = y + adapter.scale * F.linear(F.linear(x.to(dtype), adapter.a.to(dtype)), adapter.b.to(dtype), bias)
    return y


def assert_as_exact(name: str, got, usual, exact) -> None:
    """The rule of all tests: at most twice the error of the usual computation in the same dtypes, and 4 ulp."""
    assert got.dtype == usual.dtype and got.shape == exact.shape, name
    got, usual, exact = got.detach(), usual.detach(), exact.detach()
    error = (got.double() - exact.double()).abs().max()
    limit = 2 * (usual.double() - exact.double()).abs().max() + 4 * ulp(float(exact.abs().max()), got.dtype)
    assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


def gradients(layer: nn.Module, x, dy, call=None) -> dict:
    """y, dx and the gradient of each trainable parameter by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    y.backward(dy.to(y.dtype))
    named = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | named


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_from_plain_shares_and_freezes(kind):
    m = plain(kind).eval()
    layer = LoRALinear.from_plain(m, 4)
    assert layer.weight is m.weight and layer.bias is m.bias and not layer.training
    assert not m.weight.requires_grad and (m.bias is None or not m.bias.requires_grad)
    assert (layer.in_features, layer.out_features, layer.fan_in_fan_out) == (20, 28, kind == "conv1d")
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["adapters.default.a", "adapters.default.b"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_a_fresh_adapter_changes_nothing(backend, kind, device):
    m = plain(kind, device=device)
    layer = LoRALinear.from_plain(m, 3, dropout=0.1, lora_bias=m.bias is not None)
    x = torch.randn(2, 5, 20, device=device)
    with use_backend(backend), backends.record() as calls:
        y = layer(x)
    assert calls == [("lora_linear", backend)]
    assert torch.equal(y, F.linear(x, m.weight.t() if kind == "conv1d" else m.weight, m.bias))


def test_initialisation_is_that_of_linear_and_peft():
    torch.manual_seed(3)
    layer = LoRALinear(18, 30, 4, alpha=6, rslora=True, lora_bias=True)
    torch.manual_seed(3)
    m, a = nn.Linear(18, 30), nn.Linear(18, 4, bias=False)
    assert torch.equal(layer.weight, m.weight) and torch.equal(layer.bias, m.bias)
    adapter = layer.adapters["default"]
    assert torch.equal(adapter.a, a.weight) and not adapter.b.any() and not adapter.bias.any()
    assert adapter.scale == 6 / math.sqrt(4) and LoRALinear(18, 30, 4).adapters["default"].scale == 1.0
    assert LoRALinear(18, 30, 4, fan_in_fan_out=True).weight.shape == (18, 30)


def test_repr_tells_what_acts():
    layer = LoRALinear(18, 30, 4, alpha=6, dropout=0.1)
    layer.add_adapter("other", 2)
    text = repr(layer)
    assert "active=('default',)" in text and "r=4, scale=1.5, p=0.1" in text and "(other)" in text


# -- numbers -------------------------------------------------------------------------------------------------------


def several(kind: str, device: str, dtype=torch.float32, adapter_dtype=None, train_base=False) -> LoRALinear:
    layer = LoRALinear.from_plain(plain(kind, device=device).to(dtype), 3, alpha=5, adapter_dtype=adapter_dtype)
    layer.add_adapter("second", 1, alpha=2, adapter_dtype=adapter_dtype)
    layer.add_adapter("third", 9, rslora=True, lora_bias=True, adapter_dtype=adapter_dtype)
    layer.active = ("default", "third", "second")
    layer.weight.requires_grad_(train_base)
    return trained(layer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("train_base", [False, True])
def test_several_adapters_are_the_equation(backend, kind, train_base, device):
    layer = several(kind, device, train_base=train_base)
    x, dy = torch.randn(3, 7, 20, device=device), torch.randn(3, 7, 28, device=device)
    with use_backend(backend), backends.record() as calls:
        got = gradients(layer, x, dy)
    assert calls == [("lora_linear", backend)] * 3
    usual = gradients(layer, x, dy, lambda x: equation(layer, x, torch.float32))
    exact_layer = copy.deepcopy(layer).double()
    exact = gradients(exact_layer, x.double(), dy, lambda x: equation(exact_layer, x))
    assert set(got) == set(exact) == set(usual)
    assert ("weight" in got) == train_base and "adapters.third.bias" in got and "bias" not in got
    for name in exact:
        assert_as_exact(name, got[name], usual[name], exact[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_adapter_counts(backend, device):
    """The rule above notices when any one adapter is left out."""
    layer, x = several("linear", device), torch.randn(4, 20, device=device)
    exact, usual = equation(layer, x), equation(layer, x, torch.float32)
    for left_out in layer.active:
        partial = copy.deepcopy(layer)
        partial.active = tuple(name for name in layer.active if name != left_out)
        with use_backend(backend), pytest.raises(AssertionError, match="error"):
            assert_as_exact("y", partial(x), usual, exact)


def test_active_order_and_none():
    layer = several("linear", "cpu")
    x = torch.randn(4, 20)
    assert layer.active == ("default", "third", "second")
    layer.active = ()
    with backends.record() as calls:
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert calls == []
    layer.active = "second"
    assert layer.active == ("second",)
    layer.remove_adapter("second")
    assert layer.active == () and list(layer.adapters) == ["default", "third"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_in_training_only(backend, device):
    layer = trained(LoRALinear(32, 24, 4, dropout=0.5, device=device))
    x = torch.randn(6, 32, device=device)
    with use_backend(backend):
        assert not torch.equal(layer(x), layer(x))
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        assert torch.equal(layer.eval()(x), layer(x))
    with use_backend("reference"):
        assert_as_exact("y", layer(x), equation(layer, x, torch.float32), equation(layer, x))


def test_each_adapter_draws_its_own_mask_in_the_order_of_active(device):
    layer = LoRALinear(32, 24, 4, dropout=0.5, device=device)
    layer.add_adapter("second", 2, dropout=0.25)
    layer.active = ("second", "default")
    trained(layer)
    x = torch.randn(6, 32, device=device)

    def with_masks(dtype):
        torch.manual_seed(1)
        y = F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
        for name in ("second", "default"):
            adapter = layer.adapters[name]
            z = dropout(x.to(dtype), draw_seed(x.device), adapter.p)
            y = y + adapter.scale * (z @ adapter.a.to(dtype).t() @ adapter.b.to(dtype).t())
        return y

    torch.manual_seed(1)
    with use_backend("reference"):
        y = layer(x)
    assert_as_exact("y", y, with_masks(torch.float32), with_masks(torch.float64))


@on_triton
def test_both_backends_draw_the_same_masks(device):
    layer = LoRALinear(32, 24, 4, dropout=0.5, device=device)
    layer.add_adapter("second", 2, dropout=0.25)
    layer.active = ("default", "second")
    trained(layer)
    x, dy = torch.randn(6, 32, device=device), torch.randn(6, 24, device=device)
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        with use_backend(backend):
            results.append(gradients(layer, x, dy))
    torch.manual_seed(1)
    with use_backend("reference"):
        exact = gradients(copy.deepcopy(layer).double(), x.double(), dy.double())
    for name, truth in exact.items():
        assert_as_exact(name, results[1][name], results[0][name], truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast(backend, kind, device):
    layer = several(kind, device)
    x, dy = torch.randn(3, 7, 20, device=device), torch.randn(3, 7, 28, device=device)

    def run(call):
        with torch.autocast(device, torch.bfloat16):
            return gradients(layer, x, dy, call)

    with use_backend(backend):
        got = run(layer)
    with use_backend("reference"):
        usual = run(layer)
    exact_layer = copy.deepcopy(layer).double()
    exact = gradients(exact_layer, x.double(), dy, lambda x: equation(exact_layer, x))
    assert got["y"].dtype == torch.bfloat16 and got["adapters.default.a"].dtype == torch.float32
    for name in exact:
        assert_as_exact(name, got[name], usual[name], exact[name])


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("keep", [False, True])
def test_merge_and_unmerge(kind, keep):
    layer = several(kind, "cpu")
    x = torch.randn(6, 20)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    expected = layer.merged_weight()
    assert torch.equal(layer.weight, before["weight"])
    exact, usual = equation(layer, x), equation(layer, x, torch.float32)
    layer.merge(keep=keep)
    assert layer.merged == layer.active and torch.equal(layer.weight, expected)
    assert torch.equal(layer.merged_weight(), expected) and "merged=" in repr(layer)
    with backends.record() as calls:
        y = layer(x)
    assert calls == []
    assert torch.equal(y, F.linear(x, expected.t() if layer.fan_in_fan_out else expected, layer.bias))
    assert_as_exact("y", y, usual, exact)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="are merged"):
        layer.active = ("default",)
    merged = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.unmerge()
    for name, t in layer.state_dict().items():
        if keep or name.startswith("adapters"):
            assert torch.equal(t, before[name]), name
        else:
            # what merging rounded away
            assert (t - before[name]).abs().max() <= 2 * ulp(float(merged[name].abs().max()), torch.float32), name
    assert layer.merged == ()
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()


def test_delta_weight_in_half_precision_is_rounded_once():
    layer = trained(LoRALinear(20, 28, 4, alpha=6, dtype=torch.bfloat16))
    adapter = layer.adapters["default"]
    exact = 1.5 * (adapter.b.double() @ adapter.a.double())
    assert torch.equal(layer.delta_weight("default"), exact.to(torch.bfloat16))
    assert torch.equal(layer.merged_weight(), (layer.weight.double() + exact).to(torch.bfloat16))


def test_a_bias_that_cannot_be_merged_is_refused_before_anything_changes():
    layer = trained(LoRALinear(20, 28, 4, bias=False, lora_bias=True))
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="none to merge it into"):
        layer.merge()
    assert torch.equal(layer.weight, before) and layer.merged == ()


# -- what users do with modules ------------------------------------------------------------------------------------


def test_deepcopy_state_dict_and_dtype():
    layer, x = several("conv1d", "cpu"), torch.randn(4, 20)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.active == layer.active
    assert twin.weight is not layer.weight and twin.weight.data_ptr() != layer.weight.data_ptr()
    names = [f"adapters.{n}.{p}" for n, p in [("default", "a"), ("default", "b"), ("second", "a"), ("second", "b")]]
    names += ["adapters.third.a", "adapters.third.b", "adapters.third.bias", "bias", "weight"]
    state = layer.state_dict()
    assert sorted(state) == sorted(names)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    assert torch.equal(twin(x), layer(x))
    half = twin.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(x.bfloat16()).dtype == torch.bfloat16


def test_meta_device():
    layer = LoRALinear(20, 28, 4, device="meta", dtype=torch.bfloat16, adapter_dtype=torch.float32)
    y = layer(torch.empty(2, 20, device="meta", dtype=torch.bfloat16))
    assert y.shape == (2, 28) and y.dtype == torch.bfloat16
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend, device):
    layer = several("linear", device)
    x, dy = torch.randn(3, 20, device=device), torch.randn(3, 28, device=device)
    with use_backend(backend):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        eager, got = gradients(layer, x, dy), gradients(layer, x, dy, compiled)
        with torch.compiler.set_stance("fail_on_recompile"):
            gradients(layer, x, dy, compiled)
    assert set(eager) == set(got)
    for name in eager:
        assert torch.equal(got[name], eager[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_mask(backend, reentrant, device):
    layer = trained(LoRALinear(32, 24, 4, dropout=0.3, device=device))
    x, dy = torch.randn(6, 32, device=device), torch.randn(6, 24, device=device)
    with use_backend(backend):
        torch.manual_seed(5)
        expected = gradients(layer, x, dy)
        torch.manual_seed(5)
        got = gradients(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
        torch.manual_seed(6)
        other = gradients(layer, x, dy)
    assert {"dx", "adapters.default.a", "adapters.default.b"} <= set(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert not torch.equal(other["dx"], expected["dx"])


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: LoRALinear(20, 28, 0), "r is 0"),
        (lambda: LoRALinear(20, 28, 2.5), "r is 2.5"),
        (lambda: LoRALinear(20, 28, 4, dropout=1.0), r"dropout is 1.0; accepted: a probability in \[0, 1\)"),
        (lambda: LoRALinear(20, 28, 4, dropout=-0.1), "dropout is -0.1"),
        (lambda: LoRALinear(20, 28, 4, adapter_dtype=torch.int8), "adapter_dtype is torch.int8"),
        (lambda: LoRALinear.from_plain(nn.Conv2d(3, 3, 1), 4), "m is a Conv2d; accepted: nn.Linear"),
        (lambda: LoRALinear.from_plain(nn.Embedding(3, 3), 4), "m is a Embedding"),
        (lambda: LoRALinear(20, 28, 4).add_adapter("default", 4), "'default'; accepted: a new name"),
        (lambda: LoRALinear(20, 28, 4).add_adapter("a.b", 4), "'a.b'"),
        (lambda: LoRALinear(20, 28, 4).add_adapter("keys", 4), "'keys'"),
        (lambda: LoRALinear(20, 28, 4).add_adapter("", 4), "''"),
        (lambda: LoRALinear(20, 28, 4).delta_weight("nope"), "no adapter 'nope'; there are default"),
        (lambda: LoRALinear(20, 28, 4).remove_adapter("nope"), "no adapter 'nope'"),
        (lambda: setattr(LoRALinear(20, 28, 4), "active", ("default", "nope")), "no adapter 'nope'"),
        (lambda: setattr(LoRALinear(20, 28, 4), "active", ("default", "default")), "each adapter once"),
        (lambda: LoRALinear(20, 28, 4)(torch.randn(3, 21)), "x has 21 channels"),
        (lambda: LoRALinear(20, 28, 4)(torch.randn(3, 20).half()), "dtype"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()


def test_a_quantised_weight_is_refused_and_nothing_is_frozen():
    m = nn.Linear(20, 28)
    with pytest.raises(ValueError, match="r is 0"):
        LoRALinear.from_plain(m, 0)
    assert m.weight.requires_grad and m.bias.requires_grad
    m.weight = nn.Parameter(torch.zeros(28, 20, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="uint8"):
        LoRALinear.from_plain(m, 4)


def test_a_forced_backend_that_cannot_run_says_why():
    with use_backend("triton"), pytest.raises(BackendRefused, match="float64"):
        LoRALinear(20, 28, 4, dtype=torch.float64)(torch.randn(3, 20, dtype=torch.float64))


# -- peft ----------------------------------------------------------------------------------------------------------


def peft_pair(kind: str, adapters: dict, device: str, dtype=torch.float32, adapter_dtype=None):
    """peft's layer with random adapters and our layer with the same values, carried over by the key map."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(20, 28, bias=kind == "linear")
    if kind == "conv1d":
        base = pytest.importorskip("transformers").pytorch_utils.Conv1D(28, 20)
        nn.init.normal_(base.bias)
    model = nn.ModuleDict({"layer": base.to(device, dtype)})
    ours = LoRALinear.from_plain(copy.deepcopy(base), 1)
    ours.remove_adapter("default")
    for name, options in adapters.items():
        config = peft.LoraConfig(target_modules=["layer"], fan_in_fan_out=kind == "conv1d", **options)
        peft.inject_adapter_in_model(config, model, name)
        ours.add_adapter(
            name,
            options["r"],
            alpha=options["lora_alpha"],
            rslora=options.get("use_rslora", False),
            lora_bias=options.get("lora_bias", False),
            adapter_dtype=adapter_dtype,
        )
    theirs = model["layer"]
    theirs.set_adapter(list(adapters))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.4)
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    ours.load_state_dict(to_ours("lora.conv1d" if kind == "conv1d" else "lora.linear", theirs.state_dict()))
    ours.active = tuple(adapters)
    return theirs.train(), ours.train()


ONE = {"default": {"r": 5, "lora_alpha": 8, "use_rslora": True, "lora_bias": True}}
TWO = {"one": {"r": 3, "lora_alpha": 6}, "two": {"r": 8, "lora_alpha": 4, "use_rslora": True}}


@pytest.mark.filterwarnings("ignore:Already found")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind, adapters, dtype, adapter_dtype, autocast",
    [
        ("linear", ONE, torch.float32, None, False),
        ("linear without bias", TWO, torch.float32, None, False),
        ("conv1d", TWO, torch.float32, None, False),
        ("linear", ONE, torch.bfloat16, torch.float32, False),
        ("linear", TWO, torch.bfloat16, torch.float32, False),
        ("conv1d", ONE, torch.bfloat16, torch.bfloat16, False),
        ("linear", ONE, torch.float32, None, True),
    ],
)
def test_equals_peft(backend, kind, adapters, dtype, adapter_dtype, autocast, device):
    theirs, ours = peft_pair(kind, adapters, device, dtype, adapter_dtype)
    x = torch.randn(3, 7, 20, device=device).to(dtype)
    dy = torch.randn(3, 7, 28, device=device).to(torch.bfloat16 if autocast else dtype)
    module_id = "lora.conv1d" if kind == "conv1d" else "lora.linear"
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        usual = gradients(theirs, x, dy)
        with use_backend(backend):
            mine = gradients(ours, x, dy)
    exact = gradients(copy.deepcopy(theirs).double(), x.double(), dy.double())
    mine = {n: mine.pop(n) for n in ("y", "dx")} | to_upstream(module_id, mine)
    assert set(mine) == set(usual)
    for name in usual:
        assert_as_exact(name, mine[name], usual[name], exact[name])
    if dtype == torch.float32:
        for name in adapters:
            assert torch.equal(ours.delta_weight(name), theirs.get_delta_weight(name))


def test_importing_modules_needs_no_peft_nor_transformers():
    code = "import sys, vlkernels.modules, vlkernels.integrations.checkpoints\n"
    code += "print({'peft', 'transformers', 'safetensors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
