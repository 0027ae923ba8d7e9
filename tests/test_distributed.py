"""Swapped models under FSDP2, one process on gloo: whole blocks as units run fused, children as units fall back."""

import os

import pytest
import torch

import vlkernels
from vlkernels.testing import meter

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


def model_and_loss():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    return model, lambda: model(input_ids=ids, labels=ids).loss


def step(model, loss):
    model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                            for p in model.parameters() if p.grad is not None]  # fmt: skip


@pytest.mark.parametrize("unit", ["block", "children"])
def test_fsdp2(unit, mesh):
    from torch.distributed.fsdp import fully_shard

    model, loss = model_and_loss()
    want = step(model, loss)
    report = vlkernels.swap(model)
    layer = model.base_model.model.model.layers[0]
    if unit == "block":
        fully_shard(layer, mesh=mesh)
    else:
        q = layer.self_attn.q_proj
        for child in (q.base_layer, q.lora_A["default"], q.lora_B["default"]):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with meter.launches() as counts:
        got = step(model, loss)
    # q and down are fused; q's children as units of their own leave down alone
    assert counts["lora_down_kernel"] == (2 if unit == "block" else 1)
    if unit == "children":
        assert any(e.backend == "stock" and "base_layer" in e.reason for e in report.entries)
    if unit == "children":
        assert vlkernels.unswap(model) == 2
    else:
        late, _ = model_and_loss()
        fully_shard(late.base_model.model.model.layers[0].self_attn.q_proj, mesh=mesh)
        report = vlkernels.swap(late)
        assert len(report) == 1 and "FSDPLinear, a subclass" in str(report)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for g, w in zip(got[1], want[1], strict=True):
        assert (g - w).abs().max() <= 64 * torch.finfo(torch.float32).eps * w.abs().max()


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
