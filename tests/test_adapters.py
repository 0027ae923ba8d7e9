"""adapter-hub's, MAGMA's and FrozenBiLM's adapters, and the generic one: upstream's equations, switches, uses."""

import copy

import pytest
import torch
from adapter_equations import CASES, D, hub, tokens
from equations import (
    BACKENDS,
    check_checkpointing,
    check_children,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    on_triton,
    randomised,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import backends, use_backend
from vlkernels.modules import (
    AdapterHubAdapter,
    FrozenBiLMAdapter,
    FrozenBiLMOutput,
    MAGMAAdapter,
    MAGMAWrapper,
    RepAdapterRouter,
    make_adapter,
)
from vlkernels.modules.adapters import KINDS
from vlkernels.testing import compare


@pytest.fixture(autouse=True)
def _reference(on_the_reference):
    """Where a test names no backend."""


@pytest.mark.parametrize("name", CASES)
def test_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize(
    "name, backend",
    [("seq", "reference"), *(pytest.param(n, "triton", marks=on_triton) for n in (
        "seq", "seq everything", "double without norm", "par", "magma scaled parallel", "frozenbilm ln"))],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_rule(name, backend, autocast, device):
    if autocast and name != "seq" and backend == "reference":
        return
    check_rule(CASES[name], backend, device, autocast)


@pytest.mark.parametrize("name", CASES)
def test_names(name):
    check_names(CASES[name])


@on_triton
@pytest.mark.parametrize("name", ["seq everything", "par", "magma scaled parallel", "frozenbilm output"])
def test_one_graph(name, device):
    torch._dynamo.reset()
    check_one_graph(CASES[name], "triton", device)


@pytest.mark.parametrize("name", ["seq everything", "magma parallel", "frozenbilm output"])
def test_checkpointing_and_copies(name):
    check_checkpointing(CASES[name], training=True)
    check_copies(CASES[name])


@pytest.mark.parametrize("name", ["seq", "seq everything", "par everything", "magma scaled parallel"])
def test_children(name):
    check_children(CASES[name])


def test_hooks_on_containers_and_activations_are_called():
    x = torch.randn(2, 3, D).double()
    for kind, paths in (
        ("double_seq_bn", ("adapter_down", "adapter_down.1")), ("magma", ("adapter", "adapter.1")),
        ("vl_adapter", ("adapters.default", "adapters.default.activation")), ("frozenbilm", ("act",)),
        ("vl_pet", ("act",)), ("bottleneck", ("act",)),
    ):  # fmt: skip
        adapter = randomised(make_adapter(kind, D, **OPTIONS.get(kind, {}))).double().eval()
        want = adapter(x, x).detach()
        for path in paths:
            seen, child = [], adapter.get_submodule(path)
            handle = child.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            got = adapter(x, x).detach()
            assert seen, (kind, path)
            assert float((got - want).abs().max()) <= 64 * compare.ulp(float(want.abs().max()), torch.float64)
            handle.remove()


def test_activations_outside_the_op_run_by_the_children():
    h, r = tokens()()
    for name in ("tanh", "leakyrelu"):
        variant = hub("double_seq_bn", non_linearity=name)
        check_identity(variant)
        with backends.record() as calls:
            randomised(variant.make())(h, r)
        assert not calls
    adapter = make_adapter("double_seq_bn", D)
    adapter.adapter_down[1] = nn.Tanh()  # someone else's
    with backends.record() as calls:
        adapter(h, r)
    assert not calls
    with pytest.raises(ValueError, match="activation is 'step'; accepted: relu, gelu"):
        make_adapter("seq_bn", D, non_linearity="step")


# -- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_ups_change_nothing(backend, dtype, device):
    """Bit for bit; and the up projections learn."""
    made = {"device": device, "dtype": dtype}
    norm = nn.LayerNorm(D, **made)
    nn.init.normal_(norm.weight)
    h, r = (torch.randn(2, 3, D, **made) for _ in range(2))
    for kind, options in (
        ("bottleneck", {"reduction": 4}), ("bottleneck", {"reduction": 4, "parallel": True, "scale": "learned"}),
        ("bottleneck", {"reduction": 2, "norm": "rms", "act": "silu"}), ("par_bn", {}),
        ("seq_bn", {"init_weights": "mam_adapter", "use_gating": True}),
        ("double_seq_bn", {"init_weights": "mam_adapter"}), ("lavin", {"r": 4}),
    ):  # fmt: skip
        adapter = make_adapter(kind, D, **options, **made)
        with use_backend(backend), backends.record() as calls:
            if adapter.place == "input":
                y = adapter.eval()(h)
                assert torch.equal(y, h)
            else:
                assert torch.equal(adapter.branch(h, r, norm), h)
                assert torch.equal(adapter(h, r), h + r)
                y = adapter(h, r, norm)
                assert torch.equal(y, norm(h + r))
            y.float().sum().backward() if adapter.place == "input" else (y.float() * h).sum().backward()
        assert {("bottleneck_adapter", backend)} == set(calls)
        up = next(m for n, m in adapter.named_modules() if n in ("up", "adapter_up", "conv_B"))
        assert up.weight.grad.any(), kind


@torch.no_grad()
def test_inits():
    torch.manual_seed(0)
    hub = AdapterHubAdapter(400, "seq_bn")
    for weight in (hub.adapter_down[0].weight, hub.adapter_up.weight):
        assert 0.018 < float(weight.std()) < 0.022
    assert not hub.adapter_up.bias.any() and not hub.adapter_down[0].bias.any()
    weight = AdapterHubAdapter(400, "seq_bn", init_weights="houlsby").adapter_up.weight
    assert 0.008 < float(weight.std()) < 0.01 and float(weight.abs().max()) <= 0.02
    par = AdapterHubAdapter(400, "par_bn", scaling="learned", use_gating=True)
    assert not par.adapter_up.weight.any() and float(par.scaling) == 1.0 and par.factor == 1.0
    bound = 400**-0.5
    assert 0.9 * bound < float(par.adapter_down[0].weight.abs().max()) <= bound
    magma = MAGMAAdapter(400, layer_norm=True)
    for i in (1, 3):
        for t in (magma.adapter[i].weight, magma.adapter[i].bias):
            assert 0.7e-3 < float(t.std()) < 1.1e-3 and float(t.abs().max()) <= 2e-3 * (1 + 1e-6)
    assert (
        bool((magma.adapter[0].weight == 1).all())
        and float(MAGMAAdapter(8, parallel=True, scaled=True).adapter_scale) == 1
    )
    router = RepAdapterRouter(400, 8)
    bound = (6 / 408) ** 0.5
    assert 0.9 * bound < float(router.conv_A.weight.abs().max()) <= bound
    assert (
        not any(t.any() for m in (router.conv_B, router.conv_D) for t in m.parameters())
        and not router.conv_A.bias.any()
    )
    assert FrozenBiLMOutput(24).LayerNorm.eps == 1e-7 and FrozenBiLMAdapter(24).down.out_features == 3


# -- uses ----------------------------------------------------------------------------------------------------------


OPTIONS = {
    "magma": {"factor": 2},
    "hyperformer": {"tasks": ("a",), "layers": 2},
    "vl_pet": {"r": 4, "heads": 2},
    "lavin": {"r": 4},
    "frozenbilm": {"ds_factor": 5},
    "compacter": {"reduction": 5, "k": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_called_alike(kind):
    """branch + residual, then the norm, is the call; with a norm of a post-norm block, a pre-norm one, and odd rows."""
    adapter = randomised(make_adapter(kind, D, **OPTIONS.get(kind, {"reduction_factor": 5} if "bn" in kind else {})))
    adapter, norm = adapter.double().eval(), randomised(nn.LayerNorm(D)).double()
    for rows in (1, 7):
        h, r = (torch.randn(2, rows, D).double() for _ in range(2))
        for own in (norm, None):
            if adapter.place == "input":
                assert adapter(h).shape == h.shape
                continue
            want = adapter.branch(h, r, own) + r
            want = want if own is None else own(want)
            got = adapter(h, r, own)
            assert float((got - want).abs().max()) <= 256 * compare.ulp(float(want.abs().max()), torch.float64)
        if not adapter.needs_residual and adapter.place == "output":
            assert torch.equal(adapter(h), adapter.branch(h))


def test_magma_around_modules():
    """Tuples keep what follows their first element; keywords reach the module; branch needs the sub-layer's input."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(D, D)

        def forward(self, x, mask=None, *, flag=False):
            return self.proj(x), mask, flag

    x, attention = torch.randn(2, 3, D), Attention()
    for parallel in (False, True):
        wrapper = MAGMAWrapper(attention, D, parallel=parallel)
        assert any(n.startswith("module.proj" if parallel else "attn_block.proj") for n in wrapper.state_dict())
        plain = MAGMAAdapter(D, parallel=parallel)
        plain.adapter = wrapper.adapter
        y, mask, flag = wrapper(x, "mask", flag=True)
        assert (mask, flag) == ("mask", True)
        words = {"inputs": x} if parallel else {}
        assert torch.equal(y, plain.branch(attention.proj(x), **words)) and plain.needs_inputs == parallel
    with pytest.raises(ValueError, match="inputs has shape None; accepted by a parallel adapter"):
        plain.branch(x)
    with pytest.raises(TypeError, match="called as the module"):
        wrapper.branch(x)
    mlp = nn.Sequential(nn.Linear(D, D), MAGMAAdapter(D))
    assert {"1.adapter.0.weight", "1.adapter.2.bias", "0.weight"} <= set(mlp.state_dict())


def test_frozenbilms_ln_after_drops_the_bottleneck():
    for before in (False, True):
        adapter = randomised(FrozenBiLMAdapter(D, 4, ln_before=before, ln_after=True)).double()
        x = torch.randn(2, 3, D).double()
        y = adapter(x)
        y.sum().backward()
        y, want = y.detach(), (x + adapter.ln(x)).detach()
        assert float((y - want).abs().max()) <= 8 * compare.ulp(float(y.abs().max()), torch.float64)
        assert adapter.down.weight.grad is None and adapter.ln.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend, device):
    """In training only, of the bottleneck, the same again under checkpointing."""
    adapter = randomised(FrozenBiLMAdapter(D, 4, dropout=0.5)).to(device)
    x = torch.randn(2, 3, D, device=device, requires_grad=True)
    with use_backend(backend):
        assert not torch.equal(adapter(x), adapter(x))
        torch.manual_seed(2)
        want = torch.autograd.grad(adapter(x).sum(), [x, *adapter.parameters()])
        torch.manual_seed(2)
        got = torch.autograd.grad(checkpoint(adapter, x, use_reentrant=False).sum(), [x, *adapter.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        adapter.down.register_forward_hook(lambda *_: None)  # the children do it
        assert not torch.equal(adapter(x), adapter(x))
        assert torch.equal(adapter.eval()(x), adapter(x))


@on_triton
@pytest.mark.parametrize("name", ["seq", "par", "frozenbilm"])
def test_bfloat16(name, device):
    """Parameters and all in bfloat16, odd rows, beside the reference in it and the exact numbers."""
    module = randomised(CASES[name].make()).to(device, torch.bfloat16).eval()

    def results(m, backend, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        with use_backend(backend):
            y = m(*inputs)
        torch.manual_seed(0)
        y.backward(torch.randn(y.shape, device=device).bfloat16().to(y.dtype))
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        return {"y": y} | {f"input {i}": x.grad for i, x in enumerate(inputs)} | grads

    def draw(seed):
        torch.manual_seed(seed)
        return randomised(copy.deepcopy(module)), tuple(x.bfloat16().to(device) for x in CASES[name].inputs())

    draws = [draw(seed) for seed in range(5)]
    got = results(copy.deepcopy(draws[0][0]), "triton", draws[0][1])
    exact = [results(copy.deepcopy(m).double(), "reference", [x.double() for x in i]) for m, i in draws]
    usual = [results(m, "reference", i) for m, i in draws]
    compare.assert_model(got, list(zip(usual, exact, strict=True)))
