"""adapter-hub's, MAGMA's and FrozenBiLM's adapters, and the generic one: upstream's equations, switches, uses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from equations import (
    BACKENDS,
    Variant,
    check_checkpointing,
    check_children,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    layer_norm,
    lin,
    on_triton,
    randomised,
)
from own_goldens import both, passes, write
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import backends, use_backend
from vlkernels.modules import (
    AdapterHubAdapter,
    BottleneckAdapter,
    FrozenBiLMAdapter,
    FrozenBiLMOutput,
    MAGMAAdapter,
    MAGMAWrapper,
    RepAdapterRouter,
    make_adapter,
)
from vlkernels.modules.adapters import KINDS
from vlkernels.testing import compare

D, OP = 20, ("bottleneck_adapter",)


def tokens(count=2, *shape):
    shape = shape or (3, 5, D)
    return lambda: tuple(torch.randn(shape) for _ in range(count))


# -- adapter-hub ---------------------------------------------------------------------------------------------------


class End(nn.Module):
    """An adapter and the block's norm, as the goldens have them."""

    def __init__(self, adapter, norm=True):
        super().__init__()
        self.adapter, self.layer_norm = adapter, nn.LayerNorm(D) if norm else None

    def forward(self, h, r):
        return self.adapter(h, r, self.layer_norm)


ACTS = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"),
        "tanh": torch.tanh, "leakyrelu": F.leaky_relu}  # fmt: skip


def hub(config, norm=True, **kw):
    """Step by step: what D reads and what is added, the bottleneck, the sub-layer's own end."""
    published = {"seq_bn": ("relu", 1.0), "double_seq_bn": ("swish", 1.0), "par_bn": ("relu", 4.0)}[config]
    act, scaling = ACTS[kw.get("non_linearity", published[0])], kw.get("scaling", published[1])
    before = kw.get("original_ln_before", config == "seq_bn")

    def equation(p, h, r):
        own = (lambda t: layer_norm(p, "layer_norm", t)) if norm else lambda t: t
        if config == "par_bn":
            x, kept = r, h
        else:
            x = own(h + r) if before else h
            kept = {True: h, False: x, "post_add": h + r}[kw.get("residual_before_ln", True)]
        n, i = x, int(kw.get("ln_before", False))
        if i:
            n = layer_norm(p, "adapter.adapter_norm_before", x)
        y = lin(p, "adapter.adapter_up", act(lin(p, f"adapter.adapter_down.{i}", n)))
        y = y * (p["adapter.scaling"] if scaling == "learned" else scaling)
        if kw.get("use_gating"):
            y = y * lin(p, "adapter.gate", x).sigmoid().mean(1, keepdim=True)
        inside = kw.get("adapter_residual_before_ln", False) and config != "par_bn"
        y = y + kept if inside else y
        if kw.get("ln_after"):
            y = layer_norm(p, "adapter.adapter_norm_after", y)
        y = y if inside else y + kept
        return own(y + r) if kw.get("original_ln_after", True) else y

    return Variant(
        "adapter.adapterhub", lambda: End(AdapterHubAdapter(D, config, **{"reduction_factor": 4, **kw}), norm),
        equation, tokens(), (*OP, *(("norm_residual",) if kw.get("ln_after") else ())),
    )  # fmt: skip


HUB = {
    "seq": hub("seq_bn"),
    "seq without norm": hub("seq_bn", norm=False, ln_before=True),
    "seq everything": hub("seq_bn", ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
    "seq residual after the norm": hub("seq_bn", residual_before_ln=False, use_gating=True),
    "seq post_add": hub("seq_bn", residual_before_ln="post_add", scaling=0.5),
    "seq inner residual": hub("seq_bn", ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu_new"),
    "seq open end": hub("seq_bn", original_ln_after=False),
    "double": hub("double_seq_bn"),
    "double without norm": hub("double_seq_bn", norm=False, ln_before=True, non_linearity="gelu", scaling="learned"),
    "double ln_after": hub("double_seq_bn", ln_after=True, original_ln_before=True),
    "par": hub("par_bn"),
    "par everything": hub("par_bn", ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
}


# -- the others ----------------------------------------------------------------------------------------------------


def magma(p, x, top="adapter", first=0):
    n = layer_norm(p, f"{top}.0", x) if first else x
    return lin(p, f"{top}.{first + 2}", lin(p, f"{top}.{first}", n).relu())


def frozen(ln_before=False, ln_after=False, top=""):
    def equation(p, x, r=None):
        if ln_after:
            return x + layer_norm(p, f"{top}ln", x)
        n = layer_norm(p, f"{top}ln", x) if ln_before else x
        return x + lin(p, f"{top}up", lin(p, f"{top}down", n).relu())

    return equation


OTHERS = {
    "magma": Variant("adapter.magma", lambda: MAGMAAdapter(D, 4), lambda p, x: x + magma(p, x), tokens(1), OP),
    "magma ln": Variant("adapter.magma", lambda: MAGMAAdapter(D, 3, layer_norm=True),
                        lambda p, x: x + magma(p, x, first=1), tokens(1), OP),
    "magma parallel": Variant("adapter.magma", lambda: MAGMAWrapper(nn.Linear(D, D), D, parallel=True),
                              lambda p, x: lin(p, "module", x) + magma(p, x), tokens(1), OP),
    "magma scaled parallel": Variant(
        "adapter.magma", lambda: MAGMAWrapper(nn.Linear(D, D), D, parallel=True, scaled=True, layer_norm=True),
        lambda p, x: lin(p, "module", x) + p["adapter_scale"] * magma(p, x, first=1), tokens(1), OP,
    ),
    "frozenbilm": Variant("adapter.frozenbilm", lambda: FrozenBiLMAdapter(D, 4), frozen(), tokens(1), OP),
    "frozenbilm ln": Variant("adapter.frozenbilm", lambda: FrozenBiLMAdapter(D, 5, ln_before=True), frozen(True),
                             tokens(1), OP),
    "frozenbilm output": Variant(
        "adapter.frozenbilm_output", lambda: FrozenBiLMOutput(D, 28, 5, ln_before=True),
        lambda p, x, r: layer_norm(p, "LayerNorm", frozen(True, top="adapter.")(p, lin(p, "dense", x)) + r, 1e-7),
        lambda: (torch.randn(3, 5, 28), torch.randn(3, 5, D)), OP,
    ),
}  # fmt: skip
CASES = HUB | OTHERS


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
        assert float((y - x - adapter.ln(x)).abs().max()) <= 8 * compare.ulp(float(y.abs().max()), torch.float64)
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


# -- files as upstream writes them ---------------------------------------------------------------------------------


X = {"x": (2, 3, D)}
FILES = {
    "hub ln_before": (
        "adapter.adapterhub",
        {"config": "seq_bn", "d": D, "config_kw": {"reduction_factor": 4, "ln_after": True, "use_gating": True,
                                                   "scaling": "learned", "residual_before_ln": "post_add"}},
        {"layer_norm.weight": (D,), "layer_norm.bias": (D,), **both("adapter.adapter_down.0", 5, D),
         **both("adapter.adapter_up", D, 5), **both("adapter.gate", 1, D), "adapter.scaling": (1,),
         "adapter.adapter_norm_after.weight": (D,), "adapter.adapter_norm_after.bias": (D,)},
        {"hidden_states": (2, 3, D), "input_tensor": (2, 3, D)},
        hub("seq_bn", ln_after=True, use_gating=True, scaling="learned", residual_before_ln="post_add").equation,
    ),
    "hub leakyrelu": (
        "adapter.adapterhub", {"config": "par_bn", "d": D, "config_kw": {"non_linearity": "leakyrelu"},
                               "with_ln": False},
        {**both("adapter.adapter_down.0", 10, D), **both("adapter.adapter_up", D, 10)},
        {"hidden_states": (2, 3, D), "input_tensor": (2, 3, D)},
        hub("par_bn", norm=False, non_linearity="leakyrelu").equation,
    ),
    "magma attention": (
        "adapter.magma", {"type": "attn_normal", "d": D, "factor": 4, "ln": True},
        {**both("attn_block.lin", D, D), **both("adapter.1", 5, D), **both("adapter.3", D, 5), "adapter.0.weight": (D,),
         "adapter.0.bias": (D,)},
        X, lambda p, x: (h := lin(p, "attn_block.lin", x)) + magma(p, h, first=1),
    ),
    "magma parallel attention": (
        "adapter.magma", {"type": "attn_scaled_parallel", "d": D, "factor": 5, "ln": False},
        {**both("module", D, D), **both("adapter.0", 4, D), **both("adapter.2", D, 4), "adapter_scale": (1,)},
        X, lambda p, x: lin(p, "module", x) + p["adapter_scale"] * magma(p, x),
    ),
    "frozenbilm ln_after": (
        "adapter.frozenbilm", {"d": D, "ds": 4, "ln_before": False, "ln_after": True},
        {**both("down", 5, D), **both("up", D, 5), "ln.weight": (D,), "ln.bias": (D,)}, X, frozen(ln_after=True),
    ),
    "frozenbilm ff": (
        "adapter.frozenbilm_output", {"which": "ff", "d": D, "ff": 28, "ds": 4},
        {**both("dense", D, 28), **both("adapter.down", 5, D), **both("adapter.up", D, 5), "LayerNorm.weight": (D,),
         "LayerNorm.bias": (D,)},
        {"x": (2, 3, 28), "residual": (2, 3, D)}, OTHERS["frozenbilm output"].equation,
    ),
}  # fmt: skip
FILES["frozenbilm ff"] = (*FILES["frozenbilm ff"][:4], lambda p, x, r: layer_norm(
    p, "LayerNorm", frozen(top="adapter.")(p, lin(p, "dense", x)) + r, 1e-7))  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_settings(name, tmp_path):
    """Settings that the recorded goldens do not have: builder, names and numbers."""
    write(tmp_path, *FILES[name])
    passes(tmp_path)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: make_adapter("lora", D), "kind is 'lora'; accepted: bottleneck, seq_bn"),
        (lambda: AdapterHubAdapter(D, "prefix"), "config is 'prefix'; accepted: seq_bn, double_seq_bn, par_bn"),
        (lambda: AdapterHubAdapter(D, "seq_bn", phm_layer=True), "seq_bn has no option 'phm_layer'"),
        (lambda: make_adapter("par_bn", D, residual_before_ln="post_add"), "residual_before_ln is 'post_add'"),
        (lambda: AdapterHubAdapter(D, init_weights="zeros"), "init_weights is 'zeros'; accepted: bert, houlsby"),
        (lambda: AdapterHubAdapter(D, scaling="free"), "scaling is 'free'; accepted: a number, 'learned'"),
        (lambda: AdapterHubAdapter(D, reduction_factor=64), "has rank 0; accepted: 1 or more"),
        (lambda: AdapterHubAdapter(D, reduction_factor=0), "reduction is 0; accepted: more than 0"),
        (lambda: BottleneckAdapter(0), "width is 0; accepted: 1 or more"),
        (lambda: BottleneckAdapter(D, norm="batch"), "norm is 'batch'; accepted: none, layer, rms"),
        (lambda: BottleneckAdapter(D, dropout=1.0), "dropout is 1.0; accepted: a dropout probability"),
        (lambda: MAGMAAdapter(D, scaled=True), "scaled=True with parallel=False"),
        (lambda: FrozenBiLMAdapter(D, 8), "width is 20, ds_factor 8; accepted: a divisor"),
    ],
)  # fmt: skip
def test_bad_construction(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda h, r: make_adapter("seq_bn", D)(h), "residual is None; accepted by this AdapterHubAdapter"),
        (lambda h, r: make_adapter("par_bn", D)(h, r[:1]), r"residual has shape \(1, 3, 20\); accepted: that"),
        (lambda h, r: make_adapter("magma", D)(h[..., :4]), r"hidden has shape \(2, 3, 4\); accepted: \(..., D\)"),
        (lambda h, r: make_adapter("seq_bn", D, use_gating=True)(h[0], r[0]), r"accepted with use_gating: \(B, L, D\)"),
        (lambda h, r: make_adapter("seq_bn", D, original_ln_after=False).branch(h, r), "original_ln_after=False"),
        (lambda h, r: make_adapter("magma", D)("text"), "hidden must be a torch.Tensor, got str"),
    ],
)  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(*tokens(2, 2, 3, D)())
