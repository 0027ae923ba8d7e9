"""modality_linear: what cases.py does not say."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlkernels import modality_linear, use_backend
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS

BACKENDS = ("reference", "triton")


def arguments(T=150, K=24, N=40, experts=2, **changes):
    index = (torch.arange(T) % 7 < 3).int()
    weights = {f"w{e}": torch.randn(N, K, requires_grad=True) for e in range(experts)}
    return {"x": torch.randn(T, K, requires_grad=True), "index": index, **weights} | changes


class Names(TorchDispatchMode):
    """The ATen operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    """No operator whose result's shape or value the host must know, forward and backward."""
    kw = arguments(gate=torch.randn(150, 24, requires_grad=True), b1=torch.randn(40, requires_grad=True))
    with Names() as seen, use_backend(backend):
        modality_linear(**kw).sum().backward()
    forbidden = ("nonzero", "item", "_local_scalar_dense", "masked_select", "index_put", "unique", "_to_cpu")
    assert seen.names and not [n for n in seen.names if any(word in n for word in forbidden)]


def test_the_dispatch_mode_sees_a_gather():
    kw = arguments()
    with Names() as seen:
        kw["x"][kw["index"] == 1]
    assert any("index" in n or "nonzero" in n for n in seen.names)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="FLOPs are counted in the interpreter")
def test_only_straddling_tiles_run_both_products():
    """1 of 8 tiles holds the end of a run: 9 tiles' products, not 16."""
    T = 8 * 128
    kw = arguments(T, 64, 256, index=(torch.arange(T) < 300).int())
    kw = {k: v.bfloat16() if v.is_floating_point() else v for k, v in kw.items()}
    with torch.no_grad(), meter.traffic() as counted:
        modality_linear(**kw, backend="triton")
    assert counted.flops == 9 * 2 * 128 * 64 * 256


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_any_integer_index(backend, dtype):
    kw = arguments()
    want = modality_linear(**kw, backend=backend)
    assert torch.equal(modality_linear(**(kw | {"index": kw["index"].to(dtype)}), backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_zero_and_gets_no_gradient(backend):
    kw = arguments(b0=torch.randn(40, requires_grad=True))
    kw["index"][:9] = -1
    kw["x"].data[:9] = float("inf")  # nor does it reach anything
    y = modality_linear(**kw, backend=backend)
    y.sum().backward()
    assert not y[:9].any() and y[9:].all()
    # the reference multiplies padding by zeros, and infinity by zero is no number
    if backend == "triton":
        assert all(kw[name].grad.isfinite().all() for name in ("w0", "w1", "b0"))
        assert not kw["x"].grad[:9].any()


def test_weights_of_other_strides():
    """Weights are read by their strides, and copied where they disagree among themselves."""
    kw = arguments(w0=torch.randn(24, 40).t(), w1=torch.randn(24, 40).t())
    mixed = kw | {"w1": kw["w1"].contiguous()}
    for given in (kw, mixed):
        got = modality_linear(**given, backend="triton")
        exact = modality_linear(**{k: compare.doubled(v) for k, v in given.items()}, backend="reference")
        plain = modality_linear(**given, backend="reference")
        error = compare.beside("y", got, plain, exact)
        assert error.ok, str(error)


def test_equals_gathering():
    """Float64: the rows of an expert alone, through that expert alone."""
    kw = {k: compare.doubled(v) for k, v in arguments(experts=4, index=torch.arange(150) % 4).items()}
    y = modality_linear(**kw, backend="reference")
    for e in range(4):
        mine = kw["index"] == e
        torch.testing.assert_close(y[mine], F.linear(kw["x"][mine], kw[f"w{e}"]), rtol=1e-13, atol=0)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("changes, error, message", [
    ({"index": zeros(150)}, TypeError, "index is torch.float32; accepted: a tensor of booleans or integers"),
    ({"index": zeros(149, dtype=torch.int32)}, ValueError, "index has shape \\(149,\\)"),
    ({"w0": zeros(40, 23), "w1": zeros(40, 23)}, ValueError, "x has shape \\(150, 24\\), w0 \\(40, 23\\)"),
    ({"w1": zeros(39, 24)}, ValueError, "w1 has shape \\(39, 24\\); accepted: the shape of w0"),
    ({"w3": zeros(40, 24)}, ValueError, "w3 is given without w2"),
    ({"b2": zeros(40)}, ValueError, "b2 is given without w2"),
    ({"b0": zeros(24)}, ValueError, "b0 has shape \\(24,\\)"),
    ({"gate": zeros(150, 23)}, ValueError, "gate has shape \\(150, 23\\)"),
    ({"act": "tanh"}, ValueError, "act is 'tanh'; accepted: gelu"),
    ({"w1": zeros(40, 24, dtype=torch.bfloat16)}, TypeError, "w1 has dtype torch.bfloat16"),
])  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        modality_linear(**(arguments() | changes))


def test_autocast():
    """Under autocast weights in float32 and rows in bfloat16 are multiplied in bfloat16."""
    kw = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = modality_linear(**(kw | {"x": kw["x"].bfloat16()}), backend="triton")
    assert y.dtype == PRECISIONS["amp-bf16"].compute
