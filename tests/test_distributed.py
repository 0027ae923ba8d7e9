"""Swapped models under FSDP2 and DDP on gloo: whole blocks as units run fused, children as units fall back.

As a script, `python tests/test_distributed.py FOLDER WRAPPING...`: the two processes of `test_two_processes`.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlkernels
from vlkernels import backends
from vlkernels.testing import meter
from vlkernels.testing.compare import beside

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def mesh(tmp_path, device):
    from torch.distributed.device_mesh import init_device_mesh

    if device != "cpu":
        pytest.skip("checked on CPU with gloo")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def model_and_loss(seed=2):
    """A peft Llama, its numbers exact in bfloat16, and a function to its loss on a batch drawn from `seed`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
            p.copy_(p.bfloat16())
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model, lambda m=model: m(input_ids=ids, labels=ids).loss


def step(model, loss):
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
                            for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip


def assert_as_exact(where, got, want, exact, dtype=None):
    """Loss and gradients of `step` by the rule."""
    assert list(got[1]) == list(want[1])
    for name, value in {"loss": want[0], **want[1]}.items():
        values = (r[0] if name == "loss" else r[1][name] for r in (got, exact))
        error = beside(f"{where}: {name}", next(values), value, next(values), dtype)
        assert error.ok, str(error)


# -- two processes -------------------------------------------------------------------------------------------------


def sharded(model, dtype=None):
    """FSDP2 as accelerate does it: each decoder layer a unit, then the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


# how a model is wrapped, and the dtype it then computes in where that is not its own
WRAPPINGS = {
    "FSDP2": (sharded, None),
    "FSDP2 in bfloat16": (lambda model: sharded(model, torch.bfloat16), torch.bfloat16),
    "DDP": (torch.nn.parallel.DistributedDataParallel, None),
}


def gathered(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


def two_steps(wrapping, kind, rank):
    """Losses, gradients and states of one model under one wrapping, on this rank's batch."""
    wrap = WRAPPINGS[wrapping][0]
    model, loss = model_and_loss(seed=rank)
    plain = copy.deepcopy(model.state_dict())
    if kind == "swapped":
        vlkernels.swap(model, strict=True)
    elif kind == "exact":
        # not rounded, whatever the wrapping computes in
        model, wrap = model.double(), sharded if "FSDP2" in wrapping else wrap
    wrapped = wrap(model)
    before = gathered(wrapped)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    inside = []  # kernels launched in each call of a decoder layer
    backend = vlkernels.use_backend("triton" if kind == "swapped" else None)
    with backend, backends.record() as calls, meter.launches() as counts:
        for layer in model.base_model.model.model.layers:
            layer.register_forward_pre_hook(lambda *_: inside.append(-counts.total()))
            layer.register_forward_hook(lambda *_: inside.append(inside.pop() + counts.total()))
        first = step(wrapped, loss)
        optimizer.step()
        second = step(wrapped, loss)
    states = {"plain": plain, "before": before, "after": gathered(wrapped)}
    return {"first": first, "second": second, "calls": calls, "inside": inside} | states


def one_process(rank, folder, wrappings):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    kinds = [(wrapping, kind) for wrapping in wrappings for kind in ("stock", "swapped", "exact")]
    torch.save({key: two_steps(*key, rank) for key in kinds}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrappings", [("FSDP2", "DDP"), pytest.param(("FSDP2 in bfloat16",), marks=pytest.mark.slow)], ids=" and ".join
)
def test_two_processes(tmp_path, device, wrappings):
    """FSDP2 and DDP over two processes: fused inside the wrapped layers, and the numbers of the unswapped model."""
    if device != "cpu":
        pytest.skip("checked on CPU with gloo")
    done = subprocess.run([sys.executable, __file__, str(tmp_path), *wrappings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for wrapping in wrappings:
        dtype = WRAPPINGS[wrapping][1]
        for rank, results in enumerate(ranks):
            stock, swapped, exact = (results[wrapping, kind] for kind in ("stock", "swapped", "exact"))
            where = f"{wrapping}, rank {rank}"
            assert not stock["calls"] and stock["inside"] == [0, 0, 0, 0], where
            assert {backend for _, backend in swapped["calls"]} == {"triton"}, where
            # two steps through two layers
            assert len(swapped["inside"]) == 4 and min(swapped["inside"]) > 0, where
            for state in (stock["before"], swapped["before"]):
                assert state.keys() == swapped["plain"].keys(), where
                assert all(torch.equal(value, swapped["plain"][name]) for name, value in state.items()), where
            for moment in ("first", "second"):
                assert_as_exact(where, swapped[moment], stock[moment], exact[moment], dtype)
            for name, value in stock["after"].items():
                error = beside(f"{where}: {name}", swapped["after"][name], value, exact["after"][name], dtype)
                assert error.ok, str(error)
        first = [results[wrapping, "swapped"]["first"] for results in ranks]
        assert not torch.equal(first[0][0], first[1][0]), f"{wrapping}: both ranks saw one batch"
        assert all(torch.equal(first[0][1][name], first[1][1][name]) for name in first[0][1]), wrapping


# -- one process ---------------------------------------------------------------------------------------------------


def test_fsdp2_with_children_as_units(mesh):
    """A layer whose children are units of their own runs stock, and the report names the child."""
    from torch.distributed.fsdp import fully_shard

    model, loss = model_and_loss()
    want = step(model, loss)
    report = vlkernels.swap(model)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    for child in (q.base_layer, q.lora_A["default"], q.lora_B["default"]):
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with meter.launches() as counts:
        got = step(model, loss)
    assert counts
    reasons = {e.path: e.reason for e in report.entries}
    assert reasons["base_model.model.model.layers.0.self_attn.q_proj"] == "base_layer is a FSDPLinear"
    assert vlkernels.unswap(model) >= 4
    exact = model_and_loss()
    assert_as_exact("children", got, want, step(exact[0].double(), exact[1]))


def test_fsdp2_before_the_swap(mesh):
    """FSDP2 makes a subclass, which is left: swap first, shard then."""
    from torch.distributed.fsdp import fully_shard

    late, _ = model_and_loss()
    fully_shard(late.base_model.model.model.layers[0].self_attn.q_proj, mesh=mesh)
    report = vlkernels.swap(late)
    left = [e.path for e in report.entries if "FSDPLinear, a subclass" in e.reason]
    assert left == ["base_model.model.model.layers.0.self_attn.q_proj"]
    assert "base_model.model.model.layers.1.self_attn.q_proj" in report.swapped


def test_fsdp2_projector(mesh):
    """A projector as one unit runs fused; with a child as a unit of its own it runs as upstream wrote it."""
    from torch.distributed.fsdp import fully_shard

    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": 24, "num_attention_heads": 2},
    )
    kind = transformers.models.llava.modeling_llava.LlavaMultiModalProjector
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    for unit in ("projector", "child"):
        torch.manual_seed(0)
        owner = torch.nn.Sequential(kind(config))
        want = owner(x)
        vlkernels.swap(owner)
        fully_shard(owner[0] if unit == "projector" else owner[0].linear_1, mesh=mesh)
        with meter.launches() as counts:
            got = owner(x)
            got.sum().backward()
        assert counts["mlp_projector_act_kernel"] == (unit == "projector")
        torch.testing.assert_close(got, want)


if __name__ == "__main__":
    # one import for both processes; at this point there is one thread
    folder, *names = sys.argv[1:]
    fork = torch.multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_process, args=(rank, Path(folder), names)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
