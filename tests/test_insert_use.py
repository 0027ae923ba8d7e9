"""Inserted models under FSDP2, DDP and accelerate's hooks, in stock checkpoints, and inside a vision-language model."""

import copy
import os

import pytest
import torch
from insert_models import IDS, close, integrator, model, set_batch, stir

import vlkernels

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("on_the_reference")


@pytest.fixture
def mesh(tmp_path, device):
    from torch.distributed.device_mesh import init_device_mesh

    if device != "cpu":
        pytest.skip("checked on CPU with gloo")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def step(m, system, inner=None):
    inner = inner or m
    if system != "hyperformer":
        set_batch(inner, system, "llama")
    y = m(IDS).logits
    y.square().mean().backward()
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    return y, {n.removeprefix("module."): full(p.grad) for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("system", ["flamingo", "llama_adapter", "cogvlm", "memvp", "lavin", "hyperformer"])
def test_sharded(system, mesh):
    """Decoder layers and the root as FSDP2's units, found by the layers' class name; DDP; the numbers of neither."""
    from torch.distributed.fsdp import fully_shard

    m = model("llama")
    vlkernels.insert(m, integrator(system))
    stir(m)
    twin, other = copy.deepcopy(m), copy.deepcopy(m)
    for layer in m.model.layers:
        assert type(layer).__name__ == "LlamaDecoderLayer"
        fully_shard(layer, mesh=mesh)
    fully_shard(m, mesh=mesh)
    assert type(m.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    want, found = step(twin, system), step(m, system)
    parallel = step(torch.nn.parallel.DistributedDataParallel(other, find_unused_parameters=True), system, other)
    for got in (found, parallel):
        assert close(got[0], want[0]) and got[1].keys() == want[1].keys()
        assert all(close(got[1][n], g) for n, g in want[1].items())
    assert vlkernels.inserted_state_dict(m).keys() == vlkernels.inserted_state_dict(twin).keys()
    with pytest.raises(ValueError, match="its class changed since insert"):
        vlkernels.remove(m)
    with pytest.raises(ValueError, match="it is sharded; accepted: insert, then shard"):
        vlkernels.insert(m, integrator("adaption_prompt", name="late"))


@torch.no_grad()
def test_accelerates_hooks():
    """A model whose modules carry accelerate's hooks, as after device_map, before insert and after remove."""
    hooks = pytest.importorskip("accelerate.hooks")
    m = model("llama")
    for module in list(m.modules()):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    base = m(IDS).logits
    for system in ("flamingo", "cogvlm"):
        vlkernels.insert(m, integrator(system))
        set_batch(m, system, "llama")
    assert torch.equal(m(IDS).logits, base)
    stir(m)
    assert not torch.equal(m(IDS).logits, base)
    vlkernels.remove(m)
    assert torch.equal(m(IDS).logits, base)


@torch.no_grad()
def test_stock_checkpoint(tmp_path):
    """save_pretrained of an adapted model is read by a stock one, which is the base."""
    m, base = model("llama"), model("llama")(IDS).logits
    vlkernels.insert(m, integrator("flamingo"))
    stir(m)
    m.save_pretrained(tmp_path)
    stock, told = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and all("vlkernels_gated" in key for key in told["unexpected_keys"])
    assert torch.equal(stock.eval()(IDS).logits, base)


@torch.no_grad()
def test_in_llava():
    """The language model inside LLaVA; with its media set, the whole model is what it was."""
    text = model("llama").config
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=8,
                                           num_attention_heads=2, patch_size=4)  # fmt: skip
    m = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    ).eval()
    base = m(IDS).logits
    report = vlkernels.insert(m, integrator("flamingo"))
    assert report.inserted == ["model.language_model.layers.1.vlkernels_gated"]
    set_batch(m, "flamingo", "llama")
    assert torch.equal(m(IDS).logits, base)
    vlkernels.remove(m)
    with pytest.raises(ValueError, match="nothing was inserted into this LlavaForConditionalGeneration"):
        vlkernels.remove(m)
