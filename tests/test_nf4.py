"""4-bit weights: codes and layout, dequantisation to the last bit, the product for few rows, the scratch."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vlkernels import lora_linear
from vlkernels.ops import _nf4, _nf4_triton, _scratch
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
# rows of whole blocks, blocks across rows, bytes across rows, fewer elements than a block, more than 256 blocks
SHAPES = ((6, 64), (10, 48), (9, 35), (3, 5), (100, 84))
KINDS = tuple((kind, size, double) for kind in ("nf4", "fp4") for size in (32, 64, 256) for double in (True, False))


@pytest.fixture(autouse=True)
def _empty_scratch():
    _scratch.release_scratch()
    yield
    _scratch.scratch_limit(_scratch.DEFAULT_LIMIT)
    _scratch.release_scratch()


def weight_of(shape, seed=0, dtype=torch.float32, device="cpu"):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(device, dtype)


# -- codes and layout ----------------------------------------------------------------------------------------------


def test_code_books():
    nf4, fp4, dynamic = _nf4.code_book("nf4"), _nf4.code_book("fp4"), _nf4.dynamic_map()
    assert nf4.shape == fp4.shape == (16,) and dynamic.shape == (256,)
    assert torch.equal(nf4, nf4.sort().values) and nf4[0] == -1 and nf4[7] == 0 and nf4[15] == 1
    assert torch.equal(fp4[8:], -fp4[:8]) and fp4[3] == 1 and fp4[1] == np.float32(0.0625 / 12)
    assert (dynamic.diff() > 0).all() and dynamic[127] == 0 and dynamic[255] == 1
    # symmetric but for 0 and 1
    assert torch.equal(dynamic[:127], -dynamic[128:255].flip(0))
    with pytest.raises(ValueError, match='\'int4\'; accepted: "nf4", "fp4"'):
        _nf4.code_book("int4")


@pytest.mark.parametrize("kind, blocksize, double", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_by_its_definition(shape, kind, blocksize, double):
    """Each code is the nearest one to w / absmax; high nibble first; an odd count ends in a zero."""
    weight = weight_of(shape)
    packed, quant = _nf4.quantize(weight, kind, blocksize, double)
    count, blocks = weight.numel(), _nf4.block_count(shape, blocksize)
    _nf4.check(packed, quant, shape, blocksize, None)
    state = _nf4.unpack_state(quant, blocks)
    index = torch.stack((packed >> 4, packed & 15), 1).flatten()
    assert index.numel() == count + count % 2
    assert (_nf4.code_book(kind)[index[count:].long()] == 0).all()
    padded = F.pad(weight.flatten(), (0, blocks * blocksize - count)).view(blocks, blocksize)
    absmax = padded.abs().amax(1)
    unit = (padded / absmax[:, None]).flatten()[:count].double()
    distance = (unit[:, None] - _nf4.code_book(kind).double()).abs()
    chosen = distance.gather(1, index[:count, None].long())[:, 0]
    assert (chosen <= distance.amin(1) + torch.finfo(torch.float32).eps).all()
    if not double:
        assert torch.equal(state.absmax, absmax)
        return
    # the 8-bit code is the nearest within a step of upstream's search, 1 / 65535 on both sides
    assert state.offset == absmax.mean()
    nested = (absmax - state.offset).abs()
    wanted = torch.stack([part.max() for part in nested.split(256)])
    assert torch.equal(state.nested_absmax, wanted)
    unit = (absmax - state.offset) / wanted.repeat_interleave(256)[:blocks]
    distance = (unit[:, None] - state.nested_code).double().abs()
    if blocks > 1:
        chosen = distance.gather(1, state.absmax[:, None].long())[:, 0]
        assert (chosen <= distance.amin(1) + 4 / 65535).all()


def test_ties_zero_blocks_and_constant_weights():
    code = _nf4.code_book("nf4")
    weight = torch.zeros(3, 64)
    weight[0, 0], weight[0, 1] = 1.0, (code[9] + code[10]) / 2
    packed, quant = _nf4.quantize(weight, double=False)
    assert packed[0] == (15 << 4 | 9), "a tie takes the lower index"
    assert (packed[32:] == 0x77).all(), "a block of zeros holds the code of zero"
    for double in (True, False):
        for value in (0.0, 0.3):
            packed, quant = _nf4.quantize(torch.full((5, 77), value), double=double)
            assert (_nf4.dequantize(packed, quant, (5, 77)) == torch.tensor(value)).all()


def test_lengths_tell_double_quantisation():
    for blocks in (*range(1, 5000), 10**6, 2**24):
        assert _nf4.quant_bytes(blocks, True) != _nf4.quant_bytes(blocks, False)


@pytest.mark.parametrize("kind, blocksize, double", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_by_its_definition(shape, kind, blocksize, double):
    """w[i] = code[index[i]] * absmax[i // blocksize] in float32, element by element, every bit."""
    packed, quant = _nf4.quantize(weight_of(shape), kind, blocksize, double)
    parts = _nf4.unpack_state(quant, _nf4.block_count(shape, blocksize))
    state = {name: value.numpy() for name, value in parts._asdict().items()}
    flat, rows = packed.flatten().numpy(), []
    for i in range(shape[0] * shape[1]):
        index = flat[i // 2] & 15 if i % 2 else flat[i // 2] >> 4
        scale = state["absmax"][i // blocksize]
        if double:
            product = state["nested_code"][scale] * state["nested_absmax"][i // blocksize // 256]
            scale = np.float32(product + state["offset"][0])
        rows.append(state["code"][index] * scale)
    assert rows[0].dtype == np.float32
    assert torch.equal(_nf4.dequantize(packed, quant, shape, blocksize), torch.tensor(np.array(rows)).view(shape))


def test_upstream_quantises_alike():
    functional = pytest.importorskip("bitsandbytes").functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    for number, shape in enumerate(SHAPES):
        for kind, blocksize, double in KINDS:
            for dtype in _nf4.DTYPES:
                weight = weight_of(shape, number, dtype)
                weight.view(-1)[:40] = 0
                packed, state = functional.quantize_4bit(
                    weight, blocksize=blocksize, compress_statistics=double, quant_type=kind
                )
                ours, quant = _nf4.quantize(weight, kind, blocksize, double)
                parts = _nf4.unpack_state(quant, _nf4.block_count(shape, blocksize))
                assert torch.equal(ours, packed)
                assert torch.equal(parts.absmax, state.absmax) and torch.equal(parts.code, state.code)
                absmax = state.absmax
                if double:
                    assert torch.equal(parts.offset, state.offset.reshape(1))
                    assert torch.equal(parts.nested_absmax, state.state2.absmax)
                    assert torch.equal(parts.nested_code, state.state2.code)
                    absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
                want = _dequantize_4bit_compute.__wrapped__(
                    packed.flatten(), absmax, state.code, blocksize, shape, dtype
                )
                assert torch.equal(_nf4.dequantize(ours, quant, shape, blocksize, dtype=dtype), want)


# -- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _nf4.DTYPES, ids=str)
@pytest.mark.parametrize("kind, blocksize, double", [*KINDS[:6], ("fp4", 64, True), ("nf4", 4096, True)])
def test_kernel_is_the_reference_to_the_last_bit(kind, blocksize, double, dtype, device, poisoned):
    for shape in SHAPES:
        packed, quant = _nf4.quantize(weight_of(shape, device=device), kind, blocksize, double)
        for rounded in (None, torch.bfloat16, torch.float16):
            got = _nf4_triton.dequantize(packed, quant, shape, blocksize, rounded, dtype)
            want = _nf4.dequantize(packed, quant, shape, blocksize, rounded, dtype)
            assert torch.equal(got, want), (shape, rounded)


def test_two_roundings_differ_from_a_fused_multiply_add(device):
    """The state below has an absmax that a fused multiply-add would round otherwise; the kernel must not contract."""
    code = _nf4.dynamic_map()
    g = torch.Generator().manual_seed(0)
    absmax8 = torch.randint(256, (4096,), generator=g).to(torch.uint8)
    nested, offset = torch.rand(16, generator=g), torch.tensor([0.123456])
    exact = code[absmax8.long()].double() * nested.repeat_interleave(256).double() + offset.double()
    quant = _nf4.pack_state(_nf4.code_book("nf4"), absmax8, offset, code, nested).to(device)
    scales = _nf4.block_scales(quant, 4096)
    assert (scales.cpu() != exact.float()).any()
    packed = torch.full((4096 * 16, 1), 0xFF, dtype=torch.uint8, device=device)  # every code is 1
    dense = _nf4_triton.dequantize(packed, quant, (4096, 32), 32, None, torch.float32)
    assert torch.equal(dense, scales[:, None].expand(4096, 32))


@pytest.mark.aot
def test_compiled_kernels_hold_no_fused_multiply_add():
    """The interpreter never contracts; on a GPU the launch option has to see to it."""
    code = """
import dataclasses
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from unittest import mock
from triton.runtime.jit import JITFunction
from vlkernels.ops import _nf4, _nf4_triton
from vlkernels.testing import aot
builds = []
def record(self, *args, grid, warmup, **kwargs):
    builds.append(aot._build(self, args, kwargs, 90))
with mock.patch.object(JITFunction, "run", record), FakeTensorMode():
    packed = torch.empty((2048, 1), dtype=torch.uint8)
    quant = torch.empty(_nf4.quant_bytes(64, True), dtype=torch.uint8)
    _nf4_triton.dequantize(packed, quant, (64, 64), 64, None, torch.float32)
sass = []
tool = aot._tool
aot._tool = lambda *a: sass.append(tool(*a)) or sass[-1]
(build,) = builds
aot.compile_build(build)
assert "FMUL" in sass[-1] and "FFMA" not in sass[-1]
options = tuple((k, v) for k, v in build.options if k != "enable_fp_fusion")
assert len(options) < len(build.options)
aot.compile_build(dataclasses.replace(build, options=options))
assert "FFMA" in sass[-1]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape, rows", [((70, 64), 5), ((24, 84), 70), ((20, 1100), 3), ((33, 1152), 17)])
def test_few_rows_obey_the_rule(shape, rows, name, device, poisoned):
    """x Wᵀ + bias against float64 over the same rounded weight, beside F.linear's own error."""
    dtype = PRECISIONS[name].base
    packed, quant = _nf4.quantize(weight_of(shape, device=device))
    wide = torch.randn(rows, shape[1] + 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(device, dtype)
    for x, b in ((wide[:, 3:-3], bias), (wide[:, 3:-3].contiguous(), None)):
        y = _nf4_triton.linear(x, packed, quant, b, shape, 64, dtype, dtype)
        dense = _nf4.dequantize(packed, quant, shape, 64, dtype, dtype)
        exact = F.linear(x.double(), dense.double(), None if b is None else b.double())
        error = compare.beside("y", y, F.linear(x, dense, b), exact)
        assert error.ok, str(error)
    splits = _nf4_triton.config(rows, shape, 64, dtype, 90).splits
    assert (splits > 1) == (shape[1] >= 1024)


def test_which_rows_are_few():
    assert _nf4_triton.fused_reason(1, (8, 8)) is None and _nf4_triton.fused_reason(512, (8, 8)) is None
    assert "513 rows" in _nf4_triton.fused_reason(513, (8, 8))
    assert "0 rows" in _nf4_triton.fused_reason(0, (8, 8))
    assert "even number" in _nf4_triton.fused_reason(4, (8, 7))


# -- the scratch ---------------------------------------------------------------------------------------------------


def packed_weight(shape=(6, 33), seed=0, device="cpu"):
    return _nf4.quantize(weight_of(shape, seed, device=device))


def dense(weight, quant, shape=(6, 33), dtype=torch.float32):
    return _nf4_triton.dense(weight, quant, shape, 64, None, dtype)


def test_one_dequantisation_serves_until_something_changes(device):
    weight, quant = packed_weight(device=device)
    with meter.launches() as counts:
        first = dense(weight, quant)
        # a view and a detached tensor are the same memory in the same version
        assert dense(weight.view(-1).detach(), quant) is first
        assert counts["nf4_dequantize_kernel"] == 1
        assert dense(weight, quant, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert counts["nf4_dequantize_kernel"] == 2
    assert _scratch.scratch_bytes() == 6 * 33 * (4 + 2)
    assert _scratch.release_scratch() == 6 * 33 * (4 + 2) and _scratch.scratch_bytes() == 0
    assert dense(weight, quant) is not first


@pytest.mark.parametrize("which", [0, 1])
def test_changed_contents_are_never_stale(which, device):
    """A write to codes or to quant makes a new dense weight, and the old one goes."""
    pair = packed_weight(device=device)
    old = dense(*pair)
    before = old.clone()
    with torch.no_grad():
        pair[which].copy_(packed_weight(seed=1, device=device)[which])
    new = dense(*pair)
    assert torch.equal(new, _nf4.dequantize(*pair, (6, 33))) and not torch.equal(new, before)
    assert torch.equal(old, before), "what was handed out is never written again"
    assert _scratch.scratch_bytes() == new.nbytes


def test_address_reuse_is_never_stale(device):
    """A new tensor at the address, version and shape of a freed one gets its own numbers."""
    buffer = torch.empty(99, dtype=torch.uint8, device=device)
    _, quant = packed_weight(device=device)
    seen = set()
    for seed in range(4):
        content, _ = packed_weight(seed=seed, device=device)
        # another storage over the same bytes, in version 0 once more
        weight = torch.from_numpy(buffer.numpy()) if device == "cpu" else buffer.clone()
        weight.untyped_storage().copy_(content.untyped_storage())
        key = (weight.data_ptr(), weight._version)
        got = dense(weight, quant)
        assert torch.equal(got, _nf4.dequantize(weight, quant, (6, 33)))
        seen.add(key)
        del weight, got
        gc.collect()
    assert device != "cpu" or len(seen) == 1, "the addresses did repeat"


def test_entries_of_freed_weights_go(device):
    pairs = [packed_weight(seed=seed, device=device) for seed in range(3)]
    for pair in pairs:
        dense(*pair)
    assert _scratch.scratch_bytes() == 3 * 6 * 33 * 4
    kept = pairs.pop()
    del pairs, pair
    gc.collect()
    dense(*packed_weight(seed=7, device=device))
    assert _scratch.scratch_bytes() <= 2 * 6 * 33 * 4
    assert torch.equal(dense(*kept), _nf4.dequantize(*kept, (6, 33)))


def test_streams_do_not_share(device, monkeypatch):
    """A buffer that one stream fills is not read by another, which could run ahead of it."""
    pair = packed_weight(device=device)
    stream = 1
    monkeypatch.setattr(_scratch, "_stream", lambda device: stream)
    first = dense(*pair)
    stream = 2
    second = dense(*pair)
    assert second is not first and second.data_ptr() != first.data_ptr()
    stream = 1
    assert dense(*pair) is first


def test_budget(device):
    size = 6 * 33 * 4
    pairs = [packed_weight(seed=seed, device=device) for seed in range(3)]
    assert _scratch.scratch_limit(2 * size) == 2 * size == _scratch.scratch_limit()
    first, second = dense(*pairs[0]), dense(*pairs[1])
    assert dense(*pairs[0]) is first
    dense(*pairs[2])  # the second was not used for longest
    assert _scratch.scratch_bytes() == 2 * size
    assert dense(*pairs[0]) is first and dense(*pairs[1]) is not second
    _scratch.scratch_limit(size)
    assert _scratch.scratch_bytes() == size
    _scratch.scratch_limit(size - 1)
    assert dense(*pairs[0]) is not dense(*pairs[0]) and _scratch.scratch_bytes() == 0
    for wrong in (-1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="accepted: a number of bytes"):
            _scratch.scratch_limit(wrong)


def test_tensors_without_a_version_are_not_kept(device):
    with torch.inference_mode():
        pair = packed_weight(device=device)
        assert dense(*pair) is not dense(*pair)
    assert _scratch.scratch_bytes() == 0


def layers(device, count=2, width=33):
    """Odd widths: forward dequantises too."""
    g = torch.Generator().manual_seed(0)
    made = []
    for seed in range(count):
        weight, quant = packed_weight((width, width), seed, device)
        a = torch.randn(3, width, generator=g).to(device).requires_grad_()
        b = torch.randn(width, 3, generator=g).to(device).requires_grad_()
        made.append((weight, a, b, quant))
    return made


def run_layers(x, made):
    for weight, a, b, quant in made:
        x = lora_linear(x, weight, a, b, quant=quant, backend="triton")
    return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_dequantises_once(reentrant, device):
    """Forward, recomputation and backward of a layer share one dequantisation, and give the numbers without it."""
    made = layers(device)
    x = torch.randn(9, 33, device=device, requires_grad=True)
    want = torch.autograd.grad(run_layers(x, made).square().sum(), [x, made[0][1]])
    _scratch.release_scratch()
    with meter.launches() as counts:
        y = checkpoint(run_layers, x, made, use_reentrant=reentrant)
        assert counts["nf4_dequantize_kernel"] == 2
        y.square().sum().backward()
    assert counts["nf4_dequantize_kernel"] == 2
    assert torch.equal(x.grad, want[0]) and torch.equal(made[0][1].grad, want[1])
    # with room for one of the two, backward of the first makes it again
    _scratch.release_scratch()
    _scratch.scratch_limit(33 * 33 * 4)
    with meter.launches() as counts:
        y = checkpoint(run_layers, x, made, use_reentrant=reentrant)
        y.square().sum().backward()
    assert counts["nf4_dequantize_kernel"] == 5


def test_dense_weight_is_not_saved(device):
    """Of a packed weight, backward keeps the codes and quant by reference, and s; never the dense weight."""
    weight, a, b, quant = layers(device, 1)[0]
    x = torch.randn(600, 33, device=device, requires_grad=True)
    call = lambda: lora_linear(x, weight, a, b, quant=quant, backend="triton")  # noqa: E731
    assert meter.saved_bytes(call, apart=(x, weight, a, b, quant)) == 600 * 3 * 4
