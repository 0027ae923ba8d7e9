"""What lora_linear alone owes: its door, its dropout mask, its numbers at the edges of the number range."""

import math

import pytest
import torch

import vlkernels
from vlkernels import backends, lora_linear
from vlkernels.ops._dropout import dropout, keep_mask, threshold
from vlkernels.ops.lora_linear import triton as kernels
from vlkernels.testing import meter

WORD = 0xFFFFFFFF


def tensors(rows=6, K=24, N=20, R=4, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, w, a, b = (torch.randn(*s, generator=g).to(device, dtype) for s in ((rows, K), (N, K), (R, K), (N, R)))
    return x, w, a, b


def philox_bits(seed: int, row: int, col: int) -> int:
    """The mask's 16 bits from Philox4x32-7 in plain Python integers, written apart from the library's."""
    key = [seed & WORD, (seed >> 32) & WORD]
    counter = [col >> 3, row & WORD, row >> 32, 0]
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & WORD,
            (first >> 32) ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter[(col & 7) >> 1] >> (16 * (col & 1)) & 0xFFFF


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 12345, -(2**63), 2**63 - 1])
def test_mask_is_philox(seed):
    keep = keep_mask(torch.tensor(seed), 5, 21, 0.3)
    want = [[philox_bits(seed, r, c) >= round(0.3 * 65536) for c in range(21)] for r in range(5)]
    assert keep.tolist() == want


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_statistics(p):
    """Kept share within six standard errors; rows, columns and seeds unrelated."""
    keep = keep_mask(torch.tensor(3), 512, 256, p).double()
    error = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(keep.mean() - (1 - threshold(p) / 65536)) < 6 * error
    other = keep_mask(torch.tensor(4), 512, 256, p).double()
    centred, other = keep - keep.mean(), other - other.mean()
    for shifted in (other, centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert abs((centred * shifted).mean()) < 6 * p * (1 - p) / math.sqrt(keep.numel())


def test_mask_is_the_kernels(device):
    """The forward, dA and dx kernels see the reference's mask, at widths that no block divides."""
    x, w, a, b = tensors(rows=40, K=75, N=33, R=3, device=device)
    seed = torch.tensor(77, device=device)
    x.requires_grad_(), a.requires_grad_()
    y = lora_linear(x, w * 0, a, b, seed=seed, p=0.5, backend="triton")
    z = dropout(x.detach(), seed, 0.5)
    torch.testing.assert_close(y, z @ a.detach().t() @ b.t())
    y.backward(torch.ones_like(y))
    dead = ~keep_mask(seed, 40, 75, 0.5)
    assert not x.grad[dead].any() and (x.grad[~dead] != 0).all()


def test_tiny_p_is_no_dropout(device):
    """p below half a step of 1/65536 acts as 0: no seed is drawn."""
    x, w, a, b = tensors(device=device)
    state = torch.get_rng_state()
    assert torch.equal(lora_linear(x, w, a, b, p=1e-6), lora_linear(x, w, a, b))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_output(value, backend, device):
    """As in eager: a bad number spoils its own row, and only that, also where the mask drops it."""
    x, w, a, b = tensors(device=device)
    x[2, 5] = value
    y = lora_linear(x, w, a, b, seed=torch.tensor(1, device=device), p=0.5, backend=backend)
    assert not y[2].isfinite().any()
    assert y[torch.arange(6) != 2].isfinite().all()


def test_strides(device):
    """Transposed weights (GPT-2's Conv1D), sliced and transposed inputs, expanded gradients: the same numbers."""
    x, w, a, b = tensors(rows=12, device=device)
    want = lora_linear(x, w, a, b, backend="triton")
    wide = torch.full((12, 50), math.nan, device=device)
    wide[:, 13:37] = x
    assert torch.equal(lora_linear(wide[:, 13:37], w, a, b, backend="triton"), want)
    turned = [t.t().contiguous().t() for t in (x, w, a, b)]
    torch.testing.assert_close(lora_linear(*turned, backend="triton"), want)
    grads = []
    for dy in (torch.ones(12, 20, device=device), torch.ones((), device=device).expand(12, 20)):
        leaf = x.clone().requires_grad_()
        lora_linear(leaf, w, a, b, backend="triton").backward(dy)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (2, 1, 3, 24), (0, 24), (3, 0, 24)])
def test_leading_shapes(shape, device):
    _, w, a, b = tensors(device=device)
    x = torch.randn(shape, device=device)
    y = lora_linear(x, w, a, b, backend="triton")
    torch.testing.assert_close(y, lora_linear(x, w, a, b, backend="reference"))
    assert y.shape == (*shape[:-1], 20)


def test_only_needed_gradients(device):
    """Frozen tensors get no gradient and cost no kernel."""
    x, w, a, b = tensors(rows=80, device=device)
    for trained in ("x", "a", "b"):
        leaves = {"x": x, "a": a, "b": b}
        leaves[trained] = leaves[trained].clone().requires_grad_()
        y = lora_linear(leaves["x"], w, leaves["a"], leaves["b"], backend="triton")
        with meter.launches() as counts:
            y.sum().backward()
        assert leaves[trained].grad is not None
        assert counts["lora_update_kernel"] == (trained == "x")
        assert counts["lora_up_kernel"] == 0


def test_saved_tensors(device):
    """Beyond x only s (2 R bytes a token in 16 bits) and an 8-byte seed; under autocast no cast copy of a, b or W."""
    for dtype, autocast, per_row in (
        (torch.bfloat16, None, 8),
        (torch.float32, None, 16),
        (torch.float32, torch.bfloat16, 8),
    ):
        x, w, a, b = tensors(rows=64, dtype=dtype, device=device)
        x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            saved = meter.saved_bytes(lambda: lora_linear(x, w, a, b, p=0.1, backend="triton"), apart=(x, w, a, b))  # noqa: B023
        assert saved == 64 * per_row + 8


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"a": torch.randn(4, 23)}, ValueError, "a .*23.*takes|x has 24 channels"),
        ({"b": torch.randn(20, 5)}, ValueError, r"b has shape \(20, 5\)"),
        ({"weight": torch.randn(21, 24)}, ValueError, r"weight has shape \(21, 24\)"),
        ({"weight": None}, ValueError, "either weight or base"),
        ({"base": torch.randn(6, 20)}, ValueError, "either weight or base"),
        ({"bias": torch.randn(7)}, ValueError, r"bias has shape \(7,\)"),
        ({"lora_bias": torch.randn(4)}, ValueError, "lora_bias has shape"),
        ({"a": torch.randn(0, 24), "b": torch.randn(20, 0)}, ValueError, "R >= 1"),
        ({"p": 1.0}, ValueError, r"\[0, 1\)"),
        ({"p": -0.1}, ValueError, r"\[0, 1\)"),
        ({"x": torch.randn(6, 24).bfloat16()}, TypeError, "weight has dtype torch.float32, x has torch.bfloat16"),
        ({"a": torch.randn(4, 24).half()}, TypeError, "b has dtype"),
        ({"weight": torch.ones(20, 24, dtype=torch.int8)}, TypeError, "weight has dtype torch.int8"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.randn(6, 24, device="meta")}, ValueError, "one device"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "0-d int64"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"rank": 3}, TypeError, "rank"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_door(change, error, words):
    x, w, a, b = tensors()
    with pytest.raises(error, match=words):
        lora_linear(**({"x": x, "weight": w, "a": a, "b": b} | change))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.double(), "float64"),
        (lambda t: t, None),
    ],
)
def test_refusals(change, words, device):
    values = lora_linear.values(*(change(t) for t in tensors(device=device)))
    reason = kernels.refuses(*values)
    assert (reason is None) if words is None else words in reason


def test_refusals_name_the_reason(device):
    x, w, a, b = tensors(device=device)
    low = lora_linear.values(x, w, a.half(), b.half())
    assert "adapters in torch.float16 over torch.float32" in kernels.refuses(*low)
    wide = lora_linear.values(x, w, torch.randn(513, 24, device=device), torch.randn(20, 513, device=device))
    assert "rank 513" in kernels.refuses(*wide)
    none = lora_linear.values(x[:, :0], w[:, :0], a[:, :0], b)
    assert "zero channels" in kernels.refuses(*none)
    assert "dtype is torch.float64" in kernels.refuses(*lora_linear.values(x, w, a, b, dtype=torch.float64))
    with pytest.raises(backends.BackendRefused, match="rank 513"):
        lora_linear(x, w, torch.randn(513, 24, device=device), torch.randn(20, 513, device=device), backend="triton")
    # by itself the choice falls to the reference
    assert lora_linear(x, w, torch.randn(513, 24, device=device), torch.randn(20, 513, device=device)).shape == (6, 20)


def test_explain(capsys, device):
    x, w, a, b = tensors(device=device)
    told = vlkernels.explain(lora_linear, x.double(), w.double(), a.double(), b.double())
    assert told.chosen == "reference" and "float64" in told.reason
    assert "-> reference" in capsys.readouterr().out
    with vlkernels.use_backend("reference"):
        assert vlkernels.explain(lora_linear, x, w, a, b).chosen == "reference"
    with torch.no_grad():
        assert "decoding" in str(vlkernels.explain(lora_linear, x, w, a, b))


@pytest.mark.parametrize("name", ["gpu", "Triton", "cpu"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="accepted: auto, cuda, triton, reference"), vlkernels.use_backend(name):
        pass
    with pytest.raises(ValueError, match="accepted"):
        lora_linear(*tensors(), backend=name)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(device):
    """Rows that start beyond 2^31 elements are addressed with 64 bits, in and out."""
    if device != "cuda":
        pytest.skip("needs 9 GB of device memory")
    K = N = 4096
    rows = 2**31 // K + 5
    x = torch.randn(rows, K, device=device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16) / 64
    a, b = torch.randn(16, K, device=device).bfloat16() / 64, torch.randn(N, 16, device=device).bfloat16() / 4
    seed = torch.tensor(5, device=device)
    y = lora_linear(x, w, a, b, seed=seed, p=0.1, backend="triton")
    keep = keep_mask(seed, rows, K, 0.1)[-8:]
    tail = (x[-8:] * keep).double() / (1 - threshold(0.1) / 65536)
    want = x[-8:].double() @ w.double().t() + tail @ a.double().t() @ b.double().t()
    scale = want.abs().max()
    assert (y[-8:].double() - want).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * scale
