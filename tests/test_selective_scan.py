"""The selective scan and what stands on it: orders, bad input, saved bytes, copies, generation, what users do."""

import copy

import pytest
import torch
from equations import BACKENDS, on_triton, same_in_float64
from torch import nn
from torch.nn import functional as F

import vlkernels
from benchmarks.providers.selective_scan_2d import equation
from benchmarks.upstream_maps import ss2d as upstream_ss2d
from vlkernels import selective_scan_2d, use_backend
from vlkernels.modules import SS2D, MambaLayer, MambaState, VLMambaL2, VLMambaMLP
from vlkernels.ops.selective_scan_2d.reference import chunk_length, token_order
from vlkernels.testing import compare, meter


def arguments(B=2, h=2, w=3, D=4, S=3, scan="rcRC", G=1, dtype=torch.float64, **more):
    K, L = len(scan), h * w
    made = {
        "u": torch.randn(B, L, D),
        "delta": torch.randn(B, L, K, D),
        "a": -torch.rand(K * D, S) - 0.1,
        "b": torch.randn(B, L, K, G, S),
        "c": torch.randn(B, L, K, G, S),
        "d": torch.randn(K * D),
        "z": None,
        "delta_bias": torch.randn(K * D),
        "state": torch.randn(B, K, D, S),
    }
    made = {n: t if t is None else t.to(dtype).requires_grad_() for n, t in made.items()}
    return made | {"height": h, "width": w, "scan": scan, "softplus": True} | more


# -- the op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", ["r", "cR", "rcRC", "rrRR"])
def test_orders_are_upstreams_copies(scan):
    """Index arithmetic over one map gives what copies in each direction's order give."""
    kw = arguments(h=3, w=2, scan=scan, G=2)
    compared = {}
    for name, function in (("op", lambda **kw: selective_scan_2d(**kw, backend="reference")), ("copies", _in_float64)):
        y, last = function(**kw)
        compared[name] = {"y": y, "last": last, **dict(zip(LEAVES, _grads((y, last), kw), strict=True))}
    same_in_float64(compared["op"], compared["copies"])


LEAVES = ("u", "delta", "a", "b", "c", "d", "delta_bias", "state")


def _grads(outputs, kw):
    return torch.autograd.grad(sum(t.sin().sum() for t in outputs), [kw[n] for n in LEAVES])


def _in_float64(**kw):
    """The baseline computes in float32; here its .float() keeps float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t)
        return equation(**kw)


def test_token_order():
    assert token_order("rcRC", 2, 3, 6).tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("length", [1, 7, 49, 576, 729, 3136, 100_000])
def test_no_length_is_padded(length):
    """Chunks end where the map ends, and are few enough for their states to weigh little."""
    chunk = chunk_length(length)
    chunks = -(-length // chunk)
    assert chunk % 8 == 0 and (chunks - 1) * chunk < length <= chunks * chunk
    assert chunks <= length**0.5 / 4 + 1


BAD = {
    "u has shape": {"u": torch.randn(2, 0, 4)},
    "height and width are 2 and 2": {"height": 2, "width": 2},
    "height and width are 0 and 6": {"height": 0, "width": 6},
    "scan is 'rx'": {"scan": "rx"},
    "scan is 'rcR'": {"scan": "rcR"},
    "delta has shape": {"delta": torch.randn(2, 6, 4, 3)},
    "a has shape": {"a": torch.randn(4, 3)},
    "b has shape": {"b": torch.randn(2, 6, 4, 3, 3)},
    "c has shape": {"c": torch.randn(2, 6, 4, 2, 3)},
    "d has shape": {"d": torch.randn(4)},
    "delta_bias has shape": {"delta_bias": torch.randn(4, 4)},
    "z has shape": {"z": torch.randn(2, 6, 5)},
    "state has shape": {"state": torch.randn(2, 4, 3, 4)},
}


@pytest.mark.parametrize("says", BAD)
def test_bad_shapes(says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as error:
        selective_scan_2d(**(arguments(dtype=torch.float32) | BAD[says]))
    assert "accepted" in str(error.value)


def test_bad_types():
    with pytest.raises(TypeError, match="delta has dtype torch.int64"):
        selective_scan_2d(**arguments(dtype=torch.float32, delta=torch.ones(2, 6, 4, 4, dtype=torch.int64)))
    with pytest.raises(TypeError, match="a must be a torch.Tensor"):
        selective_scan_2d(**arguments(a=None))


@on_triton
def test_refusals(device):
    kw = arguments(1, 1, 2, 2, 40, "r", dtype=torch.float32)
    with pytest.raises(vlkernels.BackendRefused, match="a state of 40"):
        selective_scan_2d(**kw, backend="triton")
    kw = arguments(1, 1, 2, 2, 2, "rR", dtype=torch.float32, z=torch.randn(1, 2, 2))
    with pytest.raises(vlkernels.BackendRefused, match="z with 2 directions"):
        selective_scan_2d(**kw, backend="triton")


@on_triton
def test_offsets_pass_2_to_the_31(device):
    """Tokens 2^30 elements apart: the last starts past 2^31. Untouched pages of the buffer cost no memory."""
    if device != "cpu":
        pytest.skip("the interpreter's address space")
    stride = 2**30
    u = torch.empty(0, dtype=torch.bfloat16).set_(
        torch.UntypedStorage(2 * (2 * stride + 4)), 0, (1, 3, 4), (0, stride, 1)
    )
    kw = arguments(1, 3, 1, 4, 2, "R", dtype=torch.float32)
    u.copy_(kw["u"].detach())
    got, want = (selective_scan_2d(**(kw | {"u": x}), backend="triton")[0] for x in (u, u.contiguous()))
    assert torch.equal(got, want)


@pytest.mark.slow
@on_triton
@pytest.mark.parametrize("side", [24, 27])
def test_whole_images(side, device):
    """576 and 729 tokens, six and ten chunks, against float64."""
    kw = arguments(1, side, side, 3, 2, "C", dtype=torch.float32)
    kw = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
    results = {}
    for name in ("triton", "reference", "exact"):
        now = {n: compare.doubled(v) if name == "exact" else v for n, v in kw.items()}
        y, last = selective_scan_2d(**now, backend="triton" if name == "triton" else "reference")
        grads = torch.autograd.grad((y.sum() + last.sum()), [now[n] for n in LEAVES])
        results[name] = {"y": y, "last": last, **dict(zip(LEAVES, grads, strict=True))}
    found = [compare.beside(n, *(results[k][n] for k in ("triton", "reference", "exact"))) for n in results["exact"]]
    assert all(e.ok for e in found), "; ".join(str(e) for e in found if not e.ok)


# -- modules -------------------------------------------------------------------------------------------------------


COPIES = {f"aten::{n}" for n in ("clone", "copy_", "_to_copy", "cat", "stack", "flip", "index", "contiguous")}


@on_triton
@pytest.mark.parametrize("forward_type", ["v05", "v052d"])
def test_saved_bytes_and_no_copies(forward_type, device):
    """Forward keeps at most 0.30 of what upstream's PyTorch keeps, and copies no map."""
    module = SS2D(16, 16, forward_type=forward_type).to(device)
    x = torch.randn(1, 4, 5, 16, device=device, requires_grad=True)
    apart = [x, *module.parameters()]
    with use_backend("triton"):
        ours = meter.saved_bytes(lambda: module(x), apart)
        with meter.traffic() as seen:
            module(x)
    theirs = meter.saved_bytes(lambda: upstream_ss2d(module, x), apart)
    assert ours <= 0.30 * theirs
    assert not COPIES & set(seen.launches), seen.launches
    launched = {n for n in seen.launches if not n.startswith("aten::")}
    assert launched == {"selective_scan_2d_fwd_kernel", "selective_scan_2d_merge_kernel"}


@on_triton
def test_mamba_layer_copies_nothing(device):
    module, x = MambaLayer(8, 4).to(device), torch.randn(1, 5, 8, device=device)
    with use_backend("triton"), meter.traffic() as seen:
        module(x)
    assert not COPIES & set(seen.launches), seen.launches


@on_triton
def test_backward_of_the_projections_copies_no_map(device):
    module = SS2D(4, 2).to(device)
    x = torch.randn(1, 2, 2, 4, device=device, requires_grad=True)
    with use_backend("triton"):
        y = module(x)
    with meter.traffic() as seen:
        y.sum().backward()
    assert seen.launches["selective_scan_2d_bwd_kernel"] == 1


def of_modules():
    yield "ss2d", lambda: SS2D(6, 3), (torch.randn(2, 2, 3, 6),)
    yield "layer", lambda: MambaLayer(6, 3), (torch.randn(2, 5, 6),)
    yield "mlp", lambda: VLMambaMLP(6, 5, 3), (torch.randn(2, 4, 6),)
    yield "l2", lambda: VLMambaL2(5, 6, 7, 3), (torch.randn(2, 6, 5), (2, 3))


MODULES = [pytest.param(build, inputs, id=name) for name, build, inputs in of_modules()]


def results(module, inputs, dtype=None):
    x, *rest = inputs
    x = x.detach().requires_grad_()
    y = module(x, *rest)
    return {"y": y, **dict(zip(["x", *dict(module.named_parameters())],
            torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]), strict=True))}  # fmt: skip


@on_triton
@pytest.mark.parametrize("build, inputs", MODULES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "amp-bf16"])
def test_modules_obey_the_rule(build, inputs, autocast, device):
    """Triton's numbers beside the reference's, against float64."""
    module = build().to(device)
    inputs = tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs)
    got = {}
    for backend in ("triton", "reference"):
        with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
            got[backend] = results(module, inputs)
    doubled = tuple(t.double() if isinstance(t, torch.Tensor) else t for t in inputs)
    exact = results(copy.deepcopy(module).double(), doubled)
    dtype = torch.bfloat16 if autocast else None
    found = [compare.beside(n, got["triton"][n], got["reference"][n], exact[n], dtype) for n in exact]
    assert all(e.ok for e in found), "; ".join(str(e) for e in found if not e.ok)


@pytest.mark.parametrize("build, inputs", MODULES[:2])
def test_one_graph_checkpoints_and_copies(build, inputs):
    module = build().double()
    inputs = tuple(t.double() if isinstance(t, torch.Tensor) else t for t in inputs)
    want = results(module, inputs)
    torch._dynamo.reset()
    same_in_float64(results(torch.compile(module, fullgraph=True, backend="aot_eager"), inputs), want_of(want))
    again = results(copy.deepcopy(module), inputs)
    assert all(torch.equal(again[n], want[n]) for n in want)
    x = inputs[0].requires_grad_()
    y = torch.utils.checkpoint.checkpoint(module, x, *inputs[1:], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sin().sum(), x)[0], want["x"])


def want_of(results):
    """A compiled module's parameters carry a prefix."""
    return {n if n in ("x", "y") else f"_orig_mod.{n}": t for n, t in results.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_goes_on_where_it_stopped(backend, device):
    """A prefix, single tokens and a last stretch give what the whole sequence gives, and its last state."""
    layer, x = MambaLayer(6, 3).to(device), torch.randn(2, 7, 6, device=device)
    with use_backend(backend), torch.no_grad():
        whole, end = layer.continued(x)
        pieces, state = [], None
        for tokens in x.split((2, 1, 1, 3), 1):
            y, state = layer.continued(tokens, state)
            pieces.append(y)
    doubled = copy.deepcopy(layer).double()
    exact, _ = doubled.continued(x.double())
    assert compare.beside("y", torch.cat(pieces, 1), whole, exact).ok
    assert torch.equal(state.conv, end.conv) and state.conv.shape == (2, 12, 4)
    assert state.ssm.shape == (2, 12, 3) and state.ssm.dtype == torch.float32
    with pytest.raises(ValueError, match=r"state.ssm has shape \(2, 3, 12\)"):
        layer.continued(x, MambaState(state.conv, state.ssm.transpose(1, 2)))


def test_padding_is_masked():
    """Tokens before the padding do not see it; a padding token brings nothing into the states."""
    layer, x = MambaLayer(6, 3).double(), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    y = layer(x, mask)
    same_in_float64({"y": y[0, :3]}, {"y": layer(x[:1, :3])[0]})
    changed = torch.where(mask[..., None] == 0, 7.0, x)
    assert torch.equal(layer(changed, mask), y)


@pytest.mark.parametrize("forward_type", ["v0", "v052d"])
def test_initial_values(forward_type):
    module = SS2D(32, 5, forward_type=forward_type)
    steps = F.softplus(module.dt_projs_bias)
    assert steps.min() > 0.999e-3 and steps.max() < 0.1001 and steps.std() > 1e-2
    assert module.dt_projs_weight.abs().max() <= 2**-0.5
    assert torch.equal(module.A_logs, torch.arange(1.0, 6).log().expand(256, 5)) and (module.Ds == 1).all()
    assert [tuple(p.shape) for p in module.parameters()] == [
        (4, 12, 64), (4, 64, 2), (4, 64), (256, 5), (256,), (128, 32), (64, 1, 3, 3), (64,), (64,), (64,), (32, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["in_proj", "conv2d", "out_norm", "out_proj"])
def test_a_hook_on_a_child_acts(name):
    module, x = SS2D(4, 2), torch.randn(1, 2, 3, 4)
    want, seen = module(x), []
    getattr(module, name).register_forward_hook(lambda *given: seen.append(1))
    torch.testing.assert_close(module(x), want)
    assert seen


@pytest.mark.parametrize(
    "build, x, says",
    [
        (lambda: SS2D(4, forward_type="v3"), None, "forward_type is 'v3'"),
        (lambda: SS2D(4, 0), None, "d_state is 0"),
        (lambda: SS2D(4, d_conv=2), None, "d_conv is 2"),
        (lambda: SS2D(4), torch.randn(1, 0, 3, 4), "x has shape"),
        (lambda: SS2D(4), torch.randn(1, 3, 4), "x has shape"),
        (lambda: SS2D(4), torch.randn(1, 2, 3, 5), "x has"),
        (lambda: MambaLayer(4, 2), torch.randn(1, 0, 4), "L > 0"),
        (lambda: VLMambaMLP(4, 4, scan="both"), None, "scan is 'both'"),
        (lambda: VLMambaMLP(4, 4), torch.randn(1, 6, 4), "x has 6 tokens"),
    ],
)
def test_bad_modules(build, x, says):
    with pytest.raises(ValueError, match=says):
        build()(x)


def test_an_empty_batch():
    for module, shape in ((SS2D(4, 2), (0, 2, 3, 4)), (MambaLayer(4, 2), (0, 3, 4)), (VLMambaMLP(4, 5), (0, 4, 4))):
        x = torch.randn(shape, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.shape == shape and isinstance(module, nn.Module)
