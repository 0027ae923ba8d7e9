"""DoRA: the op beside peft, the norm and what keeps it, the module, the swapped layer."""

import copy
import dataclasses
import math
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import vlkernels
from benchmarks import memory, providers
from vlkernels import DoRALinear, backends, dora_linear
from vlkernels.modules import dora
from vlkernels.ops._dropout import dropout
from vlkernels.ops.dora_linear import reference
from vlkernels.ops.dora_linear import triton as kernels
from vlkernels.ops.dora_linear.norm import row_norm
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

CASES = {c.name: c for c in compare.cases_of(dora_linear).CASES}


def tensors(rows=6, K=24, N=20, R=4, dtype=torch.float32, device="cpu"):
    """x, weight, a, b, magnitude"""
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, K), (N, K), (R, K), (N, R), (N,))
    return [torch.randn(*s, generator=g).to(device, dtype) for s in shapes]


def near(got, want, digits=1e-6):
    """Within `digits` of the largest number of `want`."""
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= digits * want.double().abs().max()


# -- beside peft ---------------------------------------------------------------------------------------------------


def beside_peft(case, precision, device):
    """({name: ours}, {name: peft's}, {name: float64's}) for the case, all with the op's mask."""
    arguments = compare.cases_of(dora_linear).inputs(case, Make(precision, 0, device))
    truth = compare.exact(dora_linear, arguments, precision, 0)
    ours = compare.run(dora_linear, arguments, precision, "triton", 0)
    instance = providers.named(dora_linear, "peft").build(case, arguments, precision)

    def same_mask(x, p=0.5, training=True, inplace=False):
        return dropout(x, arguments["seed"], p)

    with mock.patch("torch.nn.functional.dropout", same_mask):
        y = instance.forward()
    grads = instance.backward(y, compare.cotangent(y, precision, 0, 0))
    theirs = {"y": y.detach()} | {"d" + n: g for n, g in zip(instance.leaves, grads, strict=True)}
    return ours, theirs, truth


@pytest.mark.parametrize("case", ["tiles", "wide-rank", "train-weight", "train-weight-dropout", "level1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16+fp32", "bf16+fp32 amp"])
def test_beside_peft(case, precision, device):
    """Output and every gradient are as near to float64 as stock peft's, with its dtypes and the same mask."""
    pytest.importorskip("peft")
    ours, theirs, truth = beside_peft(CASES[case], PRECISIONS[precision], device)
    assert set(ours) == set(theirs)
    for name, want in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        baseline = compare.worst(theirs[name], want)[0]
        scale, dtype = float(want.abs().max()), ours[name].dtype
        if name == "dmagnitude" and precision == "bf16+fp32" and CASES[case].get("p"):
            # there peft's product of the dropped x with W is float32, and ours bf16 as without dropout
            dtype = torch.bfloat16
        assert compare.worst(ours[name], want)[0] <= 2 * baseline + 4 * compare.ulp(scale, dtype), name


def test_norm_is_a_constant_in_backward(device):
    """The gradients with the norm given are those with the norm computed; no gradient passes into a norm."""
    for backend in ("reference", "triton"):
        x, w, a, b, m = (t.to(device).requires_grad_() for t in tensors())
        norm = row_norm(w, a, b, 0.5).requires_grad_()
        grads = []
        for given in (None, norm):
            y = dora_linear(x, w, a, b, m, given, scale=0.5, backend=backend)
            grads.append(torch.autograd.grad(y.square().sum(), (x, w, a, b, m)))
        for got, want in zip(*grads, strict=True):
            near(got, want)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(y.sum(), norm)


def test_only_needed_gradients(device):
    """Frozen tensors get no gradient and cost no kernel."""
    values = dict(zip(("x", "weight", "a", "b", "magnitude"), tensors(rows=40, device=device), strict=True))
    for p in (0.0, 0.3):
        whole = {n: t.clone().requires_grad_() for n, t in values.items()}
        seed = torch.tensor(5, device=device)
        dora_linear(**whole, p=p, seed=seed, backend="triton").square().sum().backward()
        for trained in values:
            leaf = values[trained].clone().requires_grad_()
            y = dora_linear(**values | {trained: leaf}, p=p, seed=seed, backend="triton")
            with meter.launches() as counts:
                y.square().sum().backward()
            near(leaf.grad, whole[trained].grad)
            assert counts["dora_norm_kernel"] == 0
            assert counts["dora_finish_kernel"] == (trained in ("b", "magnitude"))
            assert counts["dora_columns_kernel"] == (trained in ("x", "weight", "magnitude"))


def test_level_1_gives_the_same_bits(device):
    for p in (0.0, 0.25):
        results = []
        for level in (0, 1):
            leaves = [t.to(device).requires_grad_() for t in tensors(rows=40)]
            y = dora_linear(*leaves, seed=torch.tensor(3, device=device), p=p, level=level, backend="triton")
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(24,), (2, 1, 3, 24), (3, 0, 24)])
def test_leading_shapes(shape, device):
    _, *rest = tensors(device=device)
    y = dora_linear(torch.ones(shape, device=device), *rest, backend="triton")
    assert y.shape == (*shape[:-1], 20)
    if y.numel():
        near(y, dora_linear(torch.ones(shape, device=device), *rest, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_nan_and_inf_reach_the_output(value, p, backend, device):
    """As in eager: a bad number spoils its own row, and only that, also where the mask drops it."""
    x, *rest = tensors(device=device)
    x[2, 5] = value
    y = dora_linear(x, *rest, seed=torch.tensor(1, device=device), p=p, backend=backend)
    assert not y[2].isfinite().any()
    assert y[torch.arange(6) != 2].isfinite().all()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"a": torch.randn(4, 23)}, ValueError, "x has 24 channels"),
        ({"b": torch.randn(20, 5)}, ValueError, r"b has shape \(20, 5\)"),
        ({"weight": torch.randn(21, 24)}, ValueError, r"weight has shape \(21, 24\)"),
        ({"weight": None}, TypeError, "weight is None"),
        ({"magnitude": torch.randn(7)}, ValueError, r"magnitude has shape \(7,\)"),
        ({"magnitude": torch.ones(20, dtype=torch.int8)}, TypeError, "magnitude has dtype torch.int8"),
        ({"norm": torch.randn(20, 1)}, ValueError, r"norm has shape \(20, 1\)"),
        ({"bias": torch.randn(4)}, ValueError, "bias has shape"),
        ({"a": torch.randn(0, 24), "b": torch.randn(20, 0)}, ValueError, "R >= 1"),
        ({"p": 1.0}, ValueError, r"\[0, 1\)"),
        ({"level": 2}, ValueError, "level is 2"),
        ({"x": torch.randn(6, 24).bfloat16()}, TypeError, "weight has dtype torch.float32, x has torch.bfloat16"),
        ({"a": torch.randn(4, 24).half()}, TypeError, "b has dtype"),
        ({"magnitude": torch.randn(20, device="meta")}, ValueError, "one device"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "0-d int64"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"lora_bias": None}, TypeError, "lora_bias"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_door(change, error, words):
    names = ("x", "weight", "a", "b", "magnitude")
    with pytest.raises(error, match=words):
        dora_linear(**(dict(zip(names, tensors(), strict=True)) | change))


def test_refusals(device):
    x, w, a, b, m = tensors(device=device)
    assert kernels.refuses(*dora_linear.values(x, w, a, b, m)) is None
    assert "float64" in kernels.refuses(*dora_linear.values(*(t.double() for t in (x, w, a, b, m))))
    assert "magnitude is torch.float64" in kernels.refuses(*dora_linear.values(x, w, a, b, m.double()))
    assert "adapters in torch.float16" in kernels.refuses(*dora_linear.values(x, w, a.half(), b.half(), m))
    wide = torch.randn(513, 24, device=device), torch.randn(20, 513, device=device)
    assert "rank 513" in kernels.refuses(*dora_linear.values(x, w, *wide, m))
    assert "zero channels" in kernels.refuses(*dora_linear.values(x[:, :0], w[:, :0], a[:, :0], b, m))
    assert dora_linear(x, w, *wide, m).shape == (6, 20)
    with pytest.raises(backends.BackendRefused, match="rank 513"):
        dora_linear(x, w, *wide, m, backend="triton")
    with torch.no_grad():
        assert kernels.declines(*dora_linear.values(x, w, a, b, m)) is None
        assert "decoding" in kernels.declines(*dora_linear.values(x, w, a, b, m, row_norm(w, a, b, 1.0)))


# -- the norm ------------------------------------------------------------------------------------------------------


def factored(w, a, b, scale):
    """The norm from ‖W‖² + 2 scale <W Aᵀ, B> + scale² <B A Aᵀ, B>, by row, clamped at 0."""
    square = w.square().sum(1) + 2 * scale * ((w @ a.t()) * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return square.clamp_min(0).sqrt()


def test_norm_identity():
    """In float64 the factored form is the dense one to the last digits."""
    _, w, a, b, _ = tensors(K=136, N=70, R=17, dtype=torch.float64)
    near(factored(w, a, b, 0.7), reference.row_norm(w, a, b, 0.7), 1e-14)


@pytest.mark.parametrize("base, adapter", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")])
@pytest.mark.parametrize("left", [1.0, 1e-3])
def test_norm_kernel(base, adapter, left, device):
    """No worse than the dense norm in float32, also where B A cancels all of W but a thousandth, where the factored
    form loses its digits; peft's dense norm in the weight's dtype is worse in 16 bits."""
    base, adapter = PRECISIONS[base].base, PRECISIONS[adapter].base
    _, w, a, b, _ = tensors(K=136, N=141, R=17, device=device)
    a, b, scale = a.to(adapter), b.to(adapter), 0.5
    if left < 1:
        w = left * w - scale * (b.double() @ a.double()).float()
    w = w.to(base)
    exact = reference.row_norm(w.double(), a.double(), b.double(), scale)
    got = row_norm(w, a, b, scale, backend="triton")
    assert got.dtype == torch.float32 and got.device == w.device
    error = float(((got - exact) / exact).abs().max())
    dense = float(((reference.row_norm(w, a, b, scale) - exact) / exact).abs().max())
    assert error <= 2 * dense + 4 * torch.finfo(torch.float32).eps
    if left < 1 and base == torch.float32:
        assert float(((factored(w, a, b, scale) - exact) / exact).abs().max()) > 10 * error
    if base != torch.float32 and adapter == base and left == 1:
        stock = torch.linalg.norm(w + scale * (b @ a), dim=1).to(base)
        assert error < float(((stock - exact) / exact).abs().max()) / 10


def test_norm_builds_no_matrix(device):
    """No intermediate as large as W: the norm's partial sums are a hundredth of it."""
    x, w, a, b, m = tensors(rows=16, K=256, N=256, R=8, device=device)
    with meter.launches() as counts:
        norm = row_norm(w, a, b, 1.0, backend="triton")
    assert dict(counts) == {"dora_norm_kernel": 1, "dora_root_kernel": 1}
    tile = kernels.config(kernels.Dims(16, 256, 256, 8), torch.float32, 90).norm
    assert 256 * math.ceil(256 / tile.cols) <= w.numel() / 32
    near(norm, reference.row_norm(w, a, b, 1.0))
    turned = [t.t().contiguous().t() for t in (w, a, b)]  # Conv1D's weight
    assert torch.equal(row_norm(*turned, 1.0, backend="triton"), norm)


# -- what keeps the norm -------------------------------------------------------------------------------------------


def model(device="cpu", **options) -> DoRALinear:
    """A layer with everything random, in evaluation."""
    torch.manual_seed(0)
    m = DoRALinear(24, 20, 4, alpha=6, device=device, **options)
    with torch.no_grad():
        for p in m.parameters():
            nn.init.normal_(p, std=0.5)
    return m.eval()


def in_place(m):
    with torch.no_grad():
        m.weight.mul_(1.5)


def through_detach(m):
    m.adapters["default"].b.detach().mul_(1.5)


def assigned(m):
    """Twice, so that the allocator may hand out the first address again."""
    for factor in (2.0, 0.75):
        m.weight.data = m.weight.detach() * factor


def loaded(m):
    m.load_state_dict({name: t * 1.5 for name, t in m.state_dict().items()})


def merged_and_back(m):
    m.merge()
    m(torch.ones(1, 24))
    m.unmerge()


def merged_unseen_and_back(m):
    m.merge()
    m.unmerge()


def optimised(m):
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(m.parameters(), lr=0.3).step()


def rescaled(m):
    m.adapters["default"].scale *= 1.5


def replaced(m):
    m.adapters["default"].a = nn.Parameter(m.adapters["default"].a.detach() * 1.5)


def other_dtype(m):
    m.double().float()


NOTICED = (in_place, through_detach, assigned, loaded, merged_and_back, merged_unseen_and_back, optimised, rescaled,
           replaced, other_dtype)  # fmt: skip


def past_torch(m):
    m.weight.data.mul_(1.5)
    m.adapters["default"].a.data.numpy()[:] *= 1.5


def fresh(m: DoRALinear, x):
    """What a layer computes that never kept anything."""
    other = DoRALinear(24, 20, 4, alpha=6)
    other.load_state_dict(m.state_dict())
    other.adapters["default"].scale = m.adapters["default"].scale
    return other.eval()(x)


@pytest.mark.parametrize("change", NOTICED, ids=lambda f: f.__name__)
def test_cached_norm_follows_every_change(change):
    m, x = model(), tensors()[0]
    with dora.cached_norms(), torch.no_grad():
        before = m(x)
        kept = m._caches["default"]._norm
        assert kept is not None
        m(x)
        assert m._caches["default"]._norm is kept
        with torch.enable_grad():
            change(m)
        after = m(x)
        near(after, fresh(m, x))
        if "merged" not in change.__name__ and change is not other_dtype:
            assert (after - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("change", [*NOTICED, past_torch], ids=lambda f: f.__name__)
def test_nothing_is_kept_by_default(change):
    """Outside of cached_norms() also what torch cannot see gives right numbers; inside, with gradients."""
    m, x = model(), tensors()[0]
    with torch.no_grad():
        m(x)
        assert m._caches["default"]._norm is None
    change(m)
    with torch.no_grad():
        near(m(x), fresh(m, x))
    with dora.cached_norms():
        m(x)
        assert m._caches["default"]._norm is None
        past_torch(m)
        near(m(x).detach(), fresh(m, x).detach())


def test_a_forward_with_gradients_drops_the_norm():
    """An optimizer that writes past torch needs gradients first, so its step is never missed."""
    m, x = model(), tensors()[0]
    with dora.cached_norms():
        with torch.no_grad():
            m(x)
        m(x).sum().backward()
        past_torch(m)
        with torch.no_grad():
            near(m(x), fresh(m, x).detach())


def test_another_tensor_at_the_same_address():
    """What the allocator may do after `.data = ...`, made certain: equal address and version, other numbers."""
    m, x = model(), tensors()[0]
    memory_of_weight = m.weight.detach().numpy().copy()
    with dora.cached_norms(), torch.no_grad():
        m.weight.data = torch.from_numpy(memory_of_weight)
        m(x)
        address, version = m.weight.data_ptr(), m.weight._version
        memory_of_weight *= 1.5
        m.weight.data = torch.from_numpy(memory_of_weight)
        assert (m.weight.data_ptr(), m.weight._version) == (address, version)
        near(m(x), fresh(m, x))


def test_copies_keep_nothing():
    m, x = model(), tensors()[0]
    with dora.cached_norms(), torch.no_grad():
        want = m(x)
        for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert all(c._norm is None for c in other._caches.values())
            assert torch.equal(other(x), want)
        assert set(m.state_dict()) == {
            "weight", "bias", "adapters.default.a", "adapters.default.b", "adapters.default.magnitude"
        }  # fmt: skip
        with torch.inference_mode():
            m(x)


@pytest.mark.parametrize("kept", [False, True])
def test_compiles(kept, device):
    """One graph, also inside cached_norms(), and right after the weight changes."""
    m, x = model(device), tensors(device=device)[0]
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    with dora.cached_norms() if kept else torch.enable_grad(), torch.no_grad(), vlkernels.use_backend("triton"):
        torch.testing.assert_close(compiled(x), m(x), rtol=0, atol=0)
        past_torch(m) if device == "cpu" else in_place(m)
        near(compiled(x), fresh(m, x))


# -- the module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_fresh_adapter_changes_nothing(fan_in_fan_out, device):
    m = DoRALinear(24, 20, 4, fan_in_fan_out=fan_in_fan_out, device=device)
    x = tensors(device=device)[0]
    weight = m.weight.t() if fan_in_fan_out else m.weight
    near(m(x), nn.functional.linear(x, weight, m.bias))
    assert not m.weight.requires_grad and m.adapters["default"].magnitude.requires_grad
    near(m.adapters["default"].magnitude, weight.norm(dim=1))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merge_and_back(keep, fan_in_fan_out, device):
    """Several adapters, LoRA among them: the merged layer is the adapted one, and unmerge gives the weight back."""
    m = model(device, fan_in_fan_out=fan_in_fan_out)
    m.add_adapter("plain", 3, dora=False)
    m.add_adapter("last", 5, rslora=True)
    for p in m.adapters.parameters():
        nn.init.normal_(p, mean=0.7, std=0.2)
    x = tensors(device=device)[0]
    outputs = []
    for order in (("default", "plain", "last"), ("last", "default")):
        m.active = order
        want, before, merged = m(x), m.weight.clone(), m.merged_weight()
        m.merge(keep=keep)
        assert torch.equal(m.weight, merged)
        with meter.launches() as counts:
            near(m(x), want, 1e-5)
        assert not counts
        with pytest.raises(RuntimeError, match="merged"):
            m.add_adapter("more", 2)
        copy.deepcopy(m).unmerge()
        m.unmerge()
        near(m.weight, before, 0.0 if keep else 1e-4)  # dividing by small gains magnifies the rounding
        outputs.append(want)
    m.active = ("default", "last")
    assert (m(x) - outputs[1]).abs().max() > 1e-3 * outputs[1].abs().max()  # the order matters


def test_module_errors():
    m = model()
    with pytest.raises(ValueError, match="lora_bias"):
        m.add_adapter("x", 2, lora_bias=True)
    with pytest.raises(TypeError, match="lora_bias"):
        DoRALinear(4, 4, 2, lora_bias=True)
    plain = nn.Linear(24, 20)
    shared = DoRALinear.from_plain(plain, 3)
    assert shared.weight is plain.weight and shared.level == 0


def test_checkpointing_draws_the_same_mask(device):
    m = model(device, dropout=0.4).train()
    x = tensors(rows=40, device=device)[0].requires_grad_()
    grads = []
    for through in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False) if through else m(x)
        grads.append(torch.autograd.grad(y.square().sum(), (x, *m.adapters.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# -- the swapped layer ---------------------------------------------------------------------------------------------


def peft_layer(dtype=torch.float32, cast=True, **lora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    owner = nn.ModuleDict({"fc": nn.Linear(20, 26)}).to(dtype)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["fc"], "use_dora": True} | lora)
    owner = peft.inject_adapter_in_model(config, owner)
    for name, p in owner.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, mean=0.5 if "magnitude" in name else 0.0, std=0.3)
            p.data = p.data.float() if cast else p.data
    return owner


def run_layer(owner, x):
    owner.zero_grad(set_to_none=True)
    y = owner["fc"](x)
    y.float().square().sum().backward()
    return {"y": y.detach()} | {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}


def test_swapped_runs_the_op(device):
    """In training and in evaluation, with and without dropout, on kernels, and with the state dict untouched."""
    for p in (0.0, 0.3):
        owner = peft_layer(lora_dropout=p).to(device)
        x = torch.randn(2, 5, 20, device=device)
        keys = list(owner.state_dict())
        want = run_layer(owner.eval(), x)
        report = vlkernels.swap(owner, strict=True)
        with meter.launches() as counts:
            got = run_layer(owner, x)
        assert counts["dora_update_kernel"] == 1 and counts["dora_norm_kernel"] == 1 and counts["dora_finish_kernel"]
        for name, value in want.items():
            near(got[name], value, 1e-5)
        assert list(owner.state_dict()) == keys and report.entries[0].backend == "triton"
        with meter.launches() as counts:
            run_layer(owner.train(), x)
        assert counts["dora_down_kernel"] == (p > 0)
        owner["fc"].training = False  # peft asks the layer itself, whatever its dropout says
        near(run_layer(owner, x)["y"], want["y"], 1e-5)
        with vlkernels.use_backend("reference"):
            assert torch.equal(run_layer(owner.eval(), x)["y"], want["y"])
        vlkernels.unswap(owner)


def test_swapped_float32_adapters_over_bf16(device):
    """peft's default: the branch in float32, unless lora_compute="base" asks for the base's dtype."""
    owner = peft_layer(torch.bfloat16).to(device)
    x = torch.randn(7, 20, device=device).bfloat16()
    want = run_layer(owner, x)
    vlkernels.swap(owner)
    for compute in ("peft", "base"):
        vlkernels.swap(owner, lora_compute=compute)
        got = run_layer(owner, x)
        assert got["y"].dtype == torch.bfloat16
        for name, value in want.items():
            assert got[name].dtype == value.dtype
            near(got[name], value, 8 * torch.finfo(torch.bfloat16).eps)


def test_swapped_sees_the_weight_change(device):
    """Merging, unmerging and writes past torch: the norm belongs to no earlier weight."""
    owner, stock = peft_layer().to(device).eval(), peft_layer().to(device).eval()
    vlkernels.swap(owner)
    x = torch.randn(7, 20, device=device)
    for change in (
        lambda fc: fc.merge(),
        lambda fc: fc.unmerge(),
        lambda fc: fc.base_layer.weight.data.mul_(1.5),
        lambda fc: fc.lora_A["default"].weight.data.mul_(0.5),
        lambda fc: fc.scale_layer(2.0),
    ):
        for fc in (owner["fc"], stock["fc"]):
            change(fc)
        near(owner["fc"](x), stock["fc"](x), 1e-5)


def test_left_to_peft(device):
    """What stays stock, and the reason in the report."""
    import peft

    x = torch.randn(7, 20, device=device)

    def stays(owner, words):
        want = owner["fc"](x)
        report = vlkernels.swap(owner)
        with meter.launches() as counts:
            assert torch.equal(owner["fc"](x), want)
        assert not counts and words in report.entries[0].reason

    owner = peft_layer().to(device)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["fc"]), owner, "second")
    owner["fc"].set_adapter(["default", "second"])
    stays(owner.eval(), "2 adapters are active")
    hooked = peft_layer().to(device)
    hooked["fc"].lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    stays(hooked, "carries hooks")
    with peft.helpers.DoraCaching():
        stays(peft_layer().to(device).eval(), "DoraCaching")


# -- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_saved_bytes_and_flops(p):
    """At an eighth of 4096 x 4096, r = 128, in bf16. Level 0 keeps at most 0.36 of stock peft's bytes, level 1 0.10:
    ours besides x, which what made it mostly keeps too, against all that peft keeps; both without x, 0.51 and 0.02.
    FLOPs beside: no more than peft's at level 0, one product with W more at level 1."""
    pytest.importorskip("peft")
    dims = {"T": 128, "K": 512, "N": 512, "R": 16}
    found = next(s for s in memory.subjects(dora_linear) if s.case.get("p") == p and not s.case.get("level"))

    def subject(level):
        case = dataclasses.replace(found.case.derived(level=level), dims=dims)
        return dataclasses.replace(found, case=case)

    stock = memory.count(subject(0), found.baseline)
    level_0, level_1 = (memory.count(subject(level), found.ours) for level in (0, 1))
    with mock.patch("torch.nn.functional.dropout", memory._dropout):
        kept = [memory._run(subject(0), found.baseline, rows, input_apart=False)[0] for rows in memory.ROWS]
    whole = (kept[1] - kept[0]) / (memory.ROWS[1] - memory.ROWS[0])
    assert (level_0.saved[0], level_1.saved[0]) == (2 * (512 + 16), 2 * 16)
    assert level_0.saved[0] <= 0.36 * whole and level_1.saved[0] <= 0.10 * whole
    assert level_0.saved[0] <= 0.51 * stock.saved[0] and level_1.saved[0] <= 0.02 * stock.saved[0]
    if p == 0:
        assert whole == 24832 / 8
    flops = [c.total("flops", 128) for c in (stock, level_0, level_1)]
    product = 2 * 128 * 512 * 512
    assert flops[1] <= flops[0] and flops[2] == flops[1] + product
    assert (2 if p == 0 else 4) * product < flops[1] < (2 if p == 0 else 4) * product * 1.3
