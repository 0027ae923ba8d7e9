"""PackedLoRALinear: LoRALinear's numbers from one buffer, through everything that moves parameters about."""

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import lora_linear, use_backend
from vlkernels.modules import LoRALinear, PackedLoRALinear
from vlkernels.ops import _packed_storage
from vlkernels.ops._packed_storage import packed, spare
from vlkernels.testing import meter
from vlkernels.testing.compare import beside

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")


def pair(device="cpu", dtype=torch.float32, dropout=0.0, lora_bias=False, train=False):
    """A LoRALinear with every parameter random, and the packed layer over a copy of it."""
    plain = LoRALinear(20, 28, 3, alpha=5, dropout=dropout, lora_bias=lora_bias, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in plain.adapters.parameters():
            parameter.normal_(std=0.4)
    plain.weight.requires_grad_(train)
    return plain, PackedLoRALinear.from_lora(copy.deepcopy(plain))


def buffer(layer: PackedLoRALinear):
    return packed(layer.weight, layer.adapters["default"].b)


def gradients(layer: nn.Module, x, call=None) -> dict:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_bias, train", [(False, False), (True, True)])
def test_numbers(backend, dtype, lora_bias, train, device):
    """Output and every gradient beside LoRALinear's own in float64 and in the same dtype."""
    plain, layer = pair(device, dtype, lora_bias=lora_bias, train=train)
    x = torch.randn(2, 9, 20, device=device, dtype=dtype)
    with use_backend("reference"):
        usual = gradients(plain, x)
        exact = gradients(copy.deepcopy(plain).double(), x.double())
    with use_backend(backend), meter.launches() as counts:
        got = gradients(layer, x)
    assert counts["lora_packed_down_kernel"] == (backend == "triton")
    found = [beside(name, got[name], usual[name], exact[name]) for name in exact]
    assert got.keys() == usual.keys() and all(e.ok for e in found), "; ".join(map(str, found))


@needs_kernels
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dropout_draws_the_same_mask(autocast, device):
    plain, layer = pair(device, dropout=0.25)
    x = torch.randn(40, 20, device=device)
    found = []
    for each, backend in ((layer, "triton"), (plain, "reference"), (copy.deepcopy(plain).double(), "reference")):
        torch.manual_seed(5)
        wide = each.weight.dtype == torch.float64
        with use_backend(backend), torch.autocast(device, autocast or torch.bfloat16, enabled=bool(autocast)):
            found.append(gradients(each, x.double() if wide else x))
    got, usual, exact = found
    errors = [beside(n, got[n], usual[n], exact[n], autocast) for n in exact]
    assert all(e.ok for e in errors), "; ".join(map(str, errors))


@pytest.mark.parametrize("options", [{}, {"foreach": True}])
@pytest.mark.parametrize("train", [False, True])
def test_optimizer_steps_are_seen(options, train, device):
    """Steps on the views change what the product reads, and nothing else of the buffer."""
    plain, layer = pair(device, train=train)
    x = torch.randn(70, 20, device=device)
    losses = []
    for each in (plain, layer):
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1, **options)
        for _ in range(3):
            loss = each(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3])
    assert losses[2] < losses[0]
    torch.testing.assert_close(buffer(layer)[:, 20:], plain.adapters["default"].b.detach(), rtol=1e-3, atol=0)
    if not train:
        assert torch.equal(buffer(layer)[:, :20], plain.weight)


def test_from_plain_keeps_the_parameters(device):
    m = nn.Linear(20, 28, device=device)
    want = m.weight.detach().clone()
    layer = PackedLoRALinear.from_plain(m.eval(), 4, alpha=8)
    assert layer.weight is m.weight and layer.bias is m.bias and not layer.training and not m.weight.requires_grad
    assert torch.equal(m.weight, want) and buffer(layer).shape == (28, 24)
    x = torch.randn(5, 20, device=device)
    torch.testing.assert_close(layer(x), m(x))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: PackedLoRALinear.from_plain(nn.Conv1d(3, 3, 1), 2), TypeError, "Conv1d; accepted: nn.Linear"),
        (lambda: PackedLoRALinear.from_lora(nn.Linear(3, 3)), TypeError, "accepted: LoRALinear"),
        (lambda: PackedLoRALinear.from_lora(LoRALinear(3, 4, 2, fan_in_fan_out=True)), ValueError, "fan_in_fan_out"),
        (lambda: PackedLoRALinear.from_lora(LoRALinear(3, 4, 2, adapter_dtype=torch.float64)), TypeError, "one dtype"),
        (lambda: PackedLoRALinear.from_plain(nn.Linear(3, 3), 0), ValueError, "rank of at least 1"),
    ],
)
def test_door(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_from_lora_without_the_first_adapter():
    plain = LoRALinear(3, 4, 2)
    plain.add_adapter("other", 2)
    plain.remove_adapter("default")
    with pytest.raises(ValueError, match="accepted: one named 'default'"):
        PackedLoRALinear.from_lora(plain)


# -- what moves parameters about -----------------------------------------------------------------------------------


def test_state_dict_is_plain():
    """Contiguous tensors of their own under LoRALinear's keys, also below a prefix; keep_vars gives the parameters."""
    plain, layer = pair(lora_bias=True)
    model = nn.Sequential(nn.ReLU(), layer)
    found, want = model.state_dict(), plain.state_dict()
    assert list(found) == [f"1.{name}" for name in want]
    for name, value in want.items():
        t = found[f"1.{name}"]
        assert torch.equal(t, value) and t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * 4
    assert model.state_dict(keep_vars=True)["1.weight"] is layer.weight
    plain.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_load(assign, device):
    plain, layer = pair(device)
    model = nn.Sequential(PackedLoRALinear(20, 28, 3, alpha=5, device=device))
    before = buffer(model[0])  # held, so that its address is not given out again
    model.load_state_dict({f"0.{name}": t.clone() for name, t in plain.state_dict().items()}, assign=assign)
    x = torch.randn(3, 20, device=device)
    assert torch.equal(model(x), layer(x))
    assert (buffer(model[0]).data_ptr() == before.data_ptr()) != assign


def test_safetensors(tmp_path, device):
    from safetensors.torch import load_file, load_model, save_file, save_model

    _, layer = pair(device)
    x, fresh = torch.randn(3, 20, device=device), PackedLoRALinear(20, 28, 3, alpha=5, device=device)
    save_file(layer.state_dict(), tmp_path / "file.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "file.safetensors"))
    assert torch.equal(fresh(x), layer(x))
    fresh = PackedLoRALinear(20, 28, 3, alpha=5, device=device)
    save_model(layer, str(tmp_path / "model.safetensors"))
    load_model(fresh, str(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(x), layer(x)) and buffer(fresh) is not None


def torch_saved(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch_saved])
def test_copies(copied, device):
    _, layer = pair(device)
    x = torch.randn(3, 20, device=device)
    want = layer(x)
    (other,) = copied(nn.Sequential(layer))
    assert buffer(other).data_ptr() != buffer(layer).data_ptr()
    assert torch.equal(other(x), want) and not other.weight.requires_grad
    with torch.no_grad():
        other.adapters["default"].b.zero_()
    assert torch.equal(layer(x), want)
    # the copy packs again after a load, as the original does
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), want)


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")])
def test_conversions(move):
    _, layer = pair()
    move(nn.Sequential(layer))
    weight = layer.weight
    assert buffer(layer).dtype == weight.dtype and buffer(layer).device == weight.device
    layer.to_empty(device="cpu")
    assert buffer(layer) is not None and layer(torch.randn(3, 20).to(weight.dtype)).shape == (3, 28)


def test_apart_is_an_error_until_repacked(device):
    _, layer = pair(device)
    x = torch.randn(3, 20, device=device)
    want = layer(x)
    b = layer.adapters["default"].b
    b.data = b.data.clone()
    with pytest.raises(RuntimeError, match=r"no longer views of one buffer.*repack\(\)"):
        layer(x)
    layer.repack()
    assert torch.equal(layer(x), want)
    layer.adapters["default"].double()
    with pytest.raises(RuntimeError, match="no longer views"):
        layer(x)
    with pytest.raises(TypeError, match="one dtype and one device"):
        layer.repack()


def test_sharding_is_refused(tmp_path):
    """fully_shard takes no views; parameters sharded by hand are named by us."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for unit in (pair()[1], nn.Sequential(pair()[1])):
            with pytest.raises((TypeError, NotImplementedError), match="non-contiguous|DTensor"):
                fully_shard(unit, mesh=mesh)
                unit(torch.randn(3, 20))
        _, layer = pair()
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh), requires_grad=False)
        for call in (lambda: layer(torch.randn(3, 20)), layer.repack):
            with pytest.raises(TypeError, match="sharded one by one.*LoRALinear under FSDP2"):
                call()
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_come_and_go(device):
    """merge, a second adapter, another first one: as LoRALinear."""
    plain, layer = pair(device)
    x = torch.randn(3, 20, device=device)
    for each in (plain, layer):
        torch.manual_seed(2)
        each.add_adapter("second", 2)
        each.adapters["second"].b.data.normal_()
    for names in (("default", "second"), ("second", "default"), ("second",), ("default",)):
        plain.active = layer.active = names
        torch.testing.assert_close(layer(x), plain(x))
    want = layer(x)
    layer.merge(keep=True)
    torch.testing.assert_close(layer(x), want)
    layer.unmerge()
    assert torch.equal(layer(x), want)
    layer.remove_adapter("default")
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(TypeError, match="accepted for 'default': torch.float32"):
        layer.add_adapter("default", 5, adapter_dtype=torch.float64)
    layer.add_adapter("default", 5)
    assert buffer(layer).shape == (28, 25)


@needs_kernels
def test_compile_and_checkpoint(device):
    _, layer = pair(device, dropout=0.25)
    x = torch.randn(40, 20, device=device)
    torch.manual_seed(3)
    want = gradients(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        with meter.launches() as counts:
            got = gradients(layer, x, call)
        assert counts["lora_packed_down_kernel"] and all(torch.equal(got[n], want[n]) for n in want)


# -- x_buffer ------------------------------------------------------------------------------------------------------


@needs_kernels
def test_x_buffer_saves_the_copy(device):
    """The same bits, and the pass that copies x is gone: it writes R columns a row, not K + R."""
    _, layer = pair(device)
    x = layer.x_buffer(40)
    x.normal_()
    assert x.shape == (40, 20) and x.stride() == (23, 1) and spare(x, 3).shape == (40, 23)
    want = gradients(layer, x.clone())
    with use_backend("triton"):
        if not meter._tl.INTERPRETED.value:
            got = gradients(layer, x)
        else:
            moved = []
            for given in (x, x.clone()):
                with meter.traffic() as traffic:
                    y = layer(given)
                moved.append(traffic.moved_by["lora_packed_down_kernel"])
            assert moved[1] - moved[0] == 4 * 40 * 20
            assert torch.equal(y.detach(), want["y"])
            got = gradients(layer, x)
    assert all(torch.equal(got[n], want[n]) for n in want)


@needs_kernels
def test_x_buffer_is_shared_by_layers_in_turn(device):
    """q, k and v over one x: each writes the spare columns, and no gradient reads another's."""
    layers = [pair(device)[1] for _ in range(3)]
    x = layers[0].x_buffer(40)
    x.normal_()
    leaf = x.detach().requires_grad_()
    assert spare(leaf, 3) is not None

    def loss(x):
        return sum((layer(x) * i).sum() for i, layer in enumerate(layers, 1))

    trained = [layer.adapters["default"].b for layer in layers]
    got = torch.autograd.grad(loss(leaf), [leaf, *trained])
    copied = x.clone().requires_grad_()
    for one, other in zip(got, torch.autograd.grad(loss(copied), [copied, *trained]), strict=True):
        assert torch.equal(one, other)


@needs_kernels
def test_only_offered_columns_are_written(device):
    """x as a slice of someone's wider tensor, of the same row stride: its neighbours stay what they are."""
    _, layer = pair(device)
    wide = torch.randn(40, 23, device=device)
    before = wide.clone()
    with use_backend("triton"):
        layer(wide[:, :20])
    assert torch.equal(wide, before)
    offered = layer.x_buffer(40)
    assert spare(offered, 2) is None and spare(offered[:, :19], 4) is None and spare(offered[::2], 3) is None
    assert spare(offered[8:24], 3).data_ptr() == offered[8:24].data_ptr()
    del offered
    kept = layer.x_buffer(1)  # forgets storages that are gone
    assert spare(kept, 3) is not None
    assert not any(storage.expired() for storage, *_ in _packed_storage._offered.values())


@needs_kernels
def test_other_dtypes_of_x_are_copied(device):
    """Under autocast the buffer holds float32 and the product takes bf16: x is copied, rounded."""
    _, layer = pair(device)
    x = layer.x_buffer(40)
    x.normal_()
    with torch.autocast(device, torch.bfloat16), use_backend("triton"):
        assert torch.equal(layer(x), layer(x.clone()))


def test_the_op_takes_packed_weights_from_anyone(device):
    """The plan follows the storage, not the module."""
    _, layer = pair(device)
    first = layer.adapters["default"]
    x = torch.randn(70, 20, device=device)
    with torch.no_grad():
        y = lora_linear(x, layer.weight, first.a, first.b, layer.bias, scale=first.scale)
    assert torch.equal(y, layer(x).detach())
