"""linear_projector's position and write into the text sequence: what cases.py does not say, and its module."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlkernels import backends, linear_projector, use_backend
from vlkernels.modules import LinearProjector, LoRALinear, placeholder_rows
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Case, Make
from vlkernels.testing.compare import ulp

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
IMAGE = 7


def projector(device="cpu", **options) -> LinearProjector:
    """One with everything, and random norms."""
    module = LinearProjector(6, 10, **({"norm": "layer", "shuffle": 2, "n_positions": 9} | options)).to(device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.normal_()
    return module


def batch(device="cpu", dtype=torch.float32):
    """Two images of 4 x 6 features, 6 tokens each, in two texts of 9 words."""
    x = torch.randn(2, 4, 6, 6, device=device).to(dtype)
    ids = torch.tensor([[1, 7, 7, 7, 7, 7, 7, 2, 3], [4, 5, 7, 7, 7, 1, 7, 7, 7]], device=device)
    return x, ids, torch.randn(2, 9, 10, device=device).to(dtype)


def by_hand(module, x, ids, text, position=None):
    """The equation with transformers' masked_scatter, from a module's parameters."""
    p = dict(module.named_parameters())
    tokens = torch.stack([x[:, i : i + 2, j : j + 2].flatten(1) for i in (0, 2) for j in (0, 2, 4)], 1)
    mean = tokens.mean(-1, keepdim=True)
    var = tokens.var(-1, correction=0, keepdim=True)
    tokens = (tokens - mean) / (var + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    y = tokens @ p["linear.weight"].t() + p["linear.bias"]
    y = y + (p["position.weight"][:6] if position is None else p["position.weight"][position])
    return text.masked_scatter((ids == IMAGE)[..., None], y)


def step(call, module, *inputs):
    """The result, and the gradient of every parameter and input, for a fixed cotangent."""
    module.zero_grad(set_to_none=True)
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = call(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    y.backward(dy)
    grads = {f"input {i}": t.grad for i, t in enumerate(inputs)}
    return {"y": y.detach()} | grads | {n: p.grad.clone() for n, p in module.named_parameters()}


def assert_as_exact(got, usual, exact):
    assert set(got) == set(exact)
    for name, truth in exact.items():
        assert got[name].shape == truth.shape, name
        error = (got[name].double() - truth).abs().max()
        limit = 2 * (usual[name].double() - truth).abs().max() + 4 * ulp(float(truth.abs().max()), got[name].dtype)
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_module_against_masked_scatter_by_hand(backend, gathered, device):
    module, (x, ids, text) = projector(device), batch(device)
    where = torch.randint(9, (2, 6), device=device) if gathered else None
    index = placeholder_rows(ids == IMAGE, 12)
    with use_backend(backend), backends.record() as calls:
        got = step(lambda x, text: module(x, text, index, where), module, x, text)
    assert calls == [("linear_projector", backend)]
    usual = step(lambda x, text: by_hand(module, x, ids, text, where), module, x, text)
    double = copy.deepcopy(module).double()
    exact = step(lambda x, text: by_hand(double, x, ids, text, where), double, x.double(), text.double())
    assert_as_exact(got, usual, exact)


def test_placeholder_rows(device):
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(3, 11, device=device) < share
        truth = mask.flatten().nonzero()[:, 0]
        assert torch.equal(placeholder_rows(mask, truth.numel()), truth)
    mask = torch.tensor([True, False, True, True], device=device)
    assert placeholder_rows(mask, 2).tolist() == [0, 2] and placeholder_rows(mask, 5).tolist() == [0, 2, 3, -1, -1]
    with pytest.raises(TypeError, match="mask has dtype torch.int64"):
        placeholder_rows(mask.long(), 2)


# -- what is kept, moved and waited for ----------------------------------------------------------------------------


@on_triton
def test_only_statistics_are_kept(device):
    """Neither the text embeddings nor a plan of the write: 8 bytes a row beyond x, the index and parameters."""
    module, (x, ids, text) = projector(device), batch(device)
    index, text = placeholder_rows(ids == IMAGE, 12), text.requires_grad_()
    with use_backend("triton"):
        # text * 1 is nobody's parameter, as an embedding's output is
        saved = meter.saved_bytes(lambda: module(x, text * 1.0, index), apart=(*module.parameters(), x, index))
    assert saved == 8 * 12


@on_triton
def test_into_is_not_written_to(device):
    module, (x, ids, text) = projector(device), batch(device)
    before = text.clone()
    with use_backend("triton"):
        y = module(x, text, placeholder_rows(ids == IMAGE, 12))
    assert torch.equal(text, before) and y.data_ptr() != text.data_ptr()
    assert torch.equal(y[ids != IMAGE], text[ids != IMAGE])


@interpreted
def test_nothing_waits_for_the_device():
    """No operator that hands a value to the host or makes a shape from values, forward or backward."""
    case = next(c for c in compare.cases_of(linear_projector).CASES if "sharp" in c.tags)
    kw = compare.cases_of(linear_projector).inputs(case, Make(PRECISIONS["fp32"]))
    for call in (
        lambda: linear_projector(**kw, backend="triton").sum().backward(),
        lambda: linear_projector(**kw, backend="reference").sum().backward(),
        lambda: placeholder_rows(torch.ones(4, dtype=torch.bool), 4),
    ):
        with meter.traffic() as traffic:
            call()
        names = {n.removeprefix("aten::") for n in traffic.launches}
        assert not names & {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select"}, names


@interpreted
@pytest.mark.parametrize("options", [
    {"packed": True}, {"positions": 64, "gathered": True}, {"positions": 32, "images": 2, "packed": True},
    {"packed": True, "shuffle": 2}, {"packed": True, "frozen_x": True, "bias": True},
    {"packed": True, "frozen_x": True, "frozen": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_moves_less_than_plain_pytorch(options, precision):
    """Whatever is fused: neither forward nor backward more than gather, add and index_copy, and less together.

    transformers' masked_scatter moves more than index_copy."""
    case, module = Case("bytes", {"T": 64, "C": 16, "N": 256}, options), compare.cases_of(linear_projector)
    moved = {}
    for backend in ("triton", "reference"):
        kw = module.inputs(case, Make(PRECISIONS[precision]))
        assert linear_projector.kernels["triton"].declines(*linear_projector.values(**kw)) is None
        with meter.traffic() as forward:
            y = linear_projector(**kw, backend=backend)
        with meter.traffic() as backward:
            y.backward(torch.randn_like(y))
        moved[backend] = forward.moved, backward.moved
    assert all(ours <= plain for ours, plain in zip(moved["triton"], moved["reference"], strict=True)), moved
    assert sum(moved["triton"]) < sum(moved["reference"])


@interpreted
def test_a_frozen_projector_costs_no_product_backward():
    """Only the text embeddings learn: one pass over dy."""
    case = next(c for c in compare.cases_of(linear_projector).CASES if c.name == "packed, frozen")
    kw = compare.cases_of(linear_projector).inputs(case, Make(PRECISIONS["fp32"]))
    y = linear_projector(**kw, backend="triton")
    with meter.traffic() as traffic:
        y.backward(torch.ones_like(y))
    assert traffic.flops == 0 and traffic.launches["linear_projector_rows_kernel"] == 1


def test_declines_where_nothing_is_fused():
    """One linear, or one with a shuffle or a plain position, is plain PyTorch's."""
    x, w, table = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(3, 5)
    for kw in ({}, {"position": table}):
        assert "nothing to fuse" in linear_projector.kernels["triton"].declines(*linear_projector.values(x, w, **kw))


# -- dtypes, strides, edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_dtype, text_dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_text_in_another_dtype(x_dtype, text_dtype, backend, device):
    """The sequence keeps its dtype; the rows are cast to it, as transformers casts the features."""
    module, (x, ids, text) = projector(device).to(x_dtype), batch(device)
    x, text, index = x.to(x_dtype), text.to(text_dtype), placeholder_rows(ids == IMAGE, 12)
    with use_backend(backend):
        got = step(lambda x, text: module(x, text, index), module, x, text)
    assert got["y"].dtype == got["input 1"].dtype == text_dtype and got["input 0"].dtype == x_dtype
    with use_backend("reference"):
        usual = step(lambda x, text: module(x, text, index), module, x, text)
        double = copy.deepcopy(module).double()
        exact = step(lambda x, text: double(x, text, index), double, x.double(), text.double())
    assert_as_exact(got, usual, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_checkpoint_and_compile(backend, device):
    module, (x, ids, text) = projector(device), batch(device)
    index = placeholder_rows(ids == IMAGE, 12)

    def plain(x, text):
        return module(x, text, index)

    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for enabled in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                want = step(plain, module, x, text)
                again = step(compiled, module, x, text)
                replayed = step(
                    lambda x, text: torch.utils.checkpoint.checkpoint(plain, x, text, use_reentrant=False), module,
                    x, text,
                )  # fmt: skip
            assert want["y"].dtype == torch.float32
            for name in want:
                assert torch.equal(again[name], want[name]) and torch.equal(replayed[name], want[name]), name


@on_triton
def test_strides(device):
    """A transposed sequence, a position table that is a slice, and a cotangent without strides."""
    module, (_, ids, text) = projector(device), batch(device)
    w, b = module.linear.weight, module.linear.bias
    tokens, index = torch.randn(12, 24, device=device), placeholder_rows(ids == IMAGE, 12)
    wide = torch.randn(24, 24, device=device)
    transposed = text.transpose(1, 2).contiguous().transpose(1, 2)
    for into, table in ((text, wide[::2, :10]), (transposed, wide[:12, 3:13]), (text, wide[:, :12].t()[:, 10:20])):
        found = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in (table, into)]
            assert [t.stride() for t in leaves] == [table.stride(), into.stride()]
            y = linear_projector(tokens, w, b, position=leaves[0], into=leaves[1], index=index, backend=backend)
            found.append((y, *torch.autograd.grad(y.sum(), (*leaves, w))))
        for ours, plain in zip(*found, strict=True):
            assert (ours - plain).abs().max() <= 8 * ulp(float(plain.detach().abs().max()), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_image_and_no_text(backend, device, poisoned):
    module, (x, _, text) = projector(device), batch(device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    with use_backend(backend):
        got = step(lambda x, text: module(x, text, none), module, x[:0], text)
        assert torch.equal(got["y"], text)
        assert not any(t.any() for n, t in got.items() if n not in ("y", "input 1"))
        full = step(lambda x, text: module(x, text, torch.arange(12, device=device)), module, x, text[:, :6])
    assert not full["input 1"].any() and not any(t.isnan().any() for t in full.values())


@pytest.mark.parametrize("what", ["hook", "lora", "padding"])
def test_children_that_do_more_are_called(what, device):
    module, (x, ids, text) = projector(device), batch(device)
    index = placeholder_rows(ids == IMAGE, 12)
    want = module(x, text, index)
    seen = []
    if what == "hook":
        module.norm.register_forward_hook(lambda *_: seen.append(1))
    elif what == "lora":
        module.linear = LoRALinear.from_plain(module.linear, 2)
    else:
        module.position.padding_idx = 8
    with backends.record() as calls:
        got = module(x, text, index)
    assert ("linear_projector", "reference") not in calls and ("linear_projector", "triton") not in calls
    assert (got - want).abs().max() <= 16 * ulp(float(want.detach().abs().max()), torch.float32)
    assert len(seen) == (what == "hook")


@pytest.mark.parametrize("options", [
    {"norm": "rms", "shuffle": 1, "n_positions": 0}, {"norm": "none", "shuffle": 1, "bias": False},
    {"norm": "none", "n_positions": 0}, {"norm": "rms", "n_positions": 4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_forms_of_the_module(options, backend, device):
    """Beside the op the children compute the same."""
    module, x = projector(device, **options), torch.randn(2, 4, 4, 6, device=device)
    x = x if module.shuffle > 1 else x.flatten(1, 2)[:, :9]
    with use_backend(backend):
        got = step(lambda x: module(x), module, x)
    usual = step(lambda x: module._plain(x, None, None, None), module, x)
    double = copy.deepcopy(module).double()
    exact = step(lambda x: double._plain(x, None, None, None), double, x.double())
    assert_as_exact(got, usual, exact)


# -- bad input -----------------------------------------------------------------------------------------------------

X, W, TEXT, ROWS = torch.randn(3, 4), torch.randn(5, 4), torch.randn(8, 5), torch.tensor([1, 5, 2])
TABLE = torch.randn(6, 5)


@pytest.mark.parametrize("wrong, says", [
    ({"into": TEXT}, "into and index belong together"),
    ({"index": ROWS}, "into and index belong together"),
    ({"into": TEXT[:, :4], "index": ROWS}, r"into has shape \(8, 4\); accepted: \(..., N\) with N = 5"),
    ({"into": TEXT[0], "index": ROWS}, r"into has shape \(5,\)"),
    ({"into": TEXT, "index": ROWS[:2]}, "index has 2 elements; accepted: 3"),
    ({"into": TEXT, "index": ROWS.int()}, "index has dtype torch.int32; accepted: int64"),
    ({"into": TEXT, "index": [1, 5, 2]}, "index must be a torch.Tensor, got list"),
    ({"into": TEXT, "index": ROWS.to("meta")}, "index is on meta, x on cpu"),
    ({"into": TEXT.long(), "index": ROWS}, "into has dtype torch.int64"),
    ({"into": TEXT.to("meta"), "index": ROWS}, "into is on meta"),
    ({"position_index": ROWS}, "position_index is given without position"),
    ({"position": TABLE[:, :4]}, r"position has shape \(6, 4\); accepted: \(P, N\) with N = 5"),
    ({"position": TABLE[:2]}, "position has 2 rows; accepted: 3 or more"),
    ({"position": TABLE.half()}, "position has dtype torch.float16, x has torch.float32"),
    ({"position": TABLE, "position_index": ROWS[:1]}, "position_index has 1 elements; accepted: 3"),
    ({"position": TABLE, "x": X[0]}, r"x has shape \(4,\); accepted with a position and no position_index"),
])  # fmt: skip
def test_errors_of_the_op(wrong, says):
    with pytest.raises((TypeError, ValueError), match=says):
        linear_projector(**({"x": X, "weight": W} | wrong))


@pytest.mark.parametrize("wrong, says", [
    (lambda m: m(X, TEXT, torch.tensor([1, 8, 2])), "index reaches from 1 to 8; accepted: 0 to 7"),
    (lambda m: m(X, TEXT, torch.tensor([1, -1, 2])), "index reaches from -1 to 2"),
    (lambda m: m(X, TEXT, torch.tensor([1, 2, 2])), "index names a row twice; accepted: distinct rows"),
    (lambda m: m(X, TEXT), "into and index belong together"),
    (lambda m: m(X, position_index=torch.tensor([0, 1, 6])), "position_index reaches from 0 to 6; accepted: 0 to 5"),
    (lambda m: m(X[:, :3]), "accepted: 4 channels"),
    (lambda m: LinearProjector(4, 5)(X, position_index=ROWS), "accepted with n_positions only"),
    (lambda m: LinearProjector(4, 5, norm="batch"), "norm is 'batch'"),
    (lambda m: LinearProjector(4, 5, shuffle=0), "shuffle is 0"),
])  # fmt: skip
def test_errors_of_the_module(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong(LinearProjector(4, 5, n_positions=6))


def test_refusals_name_the_dtype():
    values = linear_projector.values(X, W, into=TEXT.double(), index=ROWS)
    if KERNELS_RUN and X.device.type == "cpu":
        assert "into is torch.float64" in linear_projector.kernels["triton"].refuses(*values)
    y = linear_projector(X, W, into=TEXT.double(), index=ROWS)
    assert y.dtype == torch.float64 and torch.equal(y[ROWS], F.linear(X, W).double())


def test_state_dict_names():
    assert set(projector().state_dict()) == {
        "norm.weight", "norm.bias", "linear.weight", "linear.bias", "position.weight"
    }  # fmt: skip
    assert isinstance(projector().norm, nn.LayerNorm) and LinearProjector(4, 5).norm is None
