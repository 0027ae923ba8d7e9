"""Writes the goldens of Llama blocks with adapters by running transformers and peft.

    python tests/goldens/make_lora_blocks.py

They cover what the public files leave out: a decoder layer, rank and alpha patterns, rsLoRA, biases, some targets.
"""

import json
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.models.llama import modeling_llama as llama

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora_llama_layer_r5__own": {
        "part": "layer", "d": 24, "ff": 42, "heads": 4, "kv_heads": 2, "r": 5, "alpha": 6, "targets": ATTENTION + MLP,
        "B": 2, "T": 6, "lens": [6, 3],
    },
    "lora_llama_layer_some_targets__own": {
        "part": "layer", "d": 24, "ff": 30, "heads": 2, "kv_heads": 2, "r": 3, "alpha": 3,
        "targets": ["q_proj", "v_proj", "up_proj"], "B": 2, "T": 5, "lens": [5, 5],
    },
    "lora_mlp_patterns_rslora__own": {
        "part": "mlp", "d": 20, "ff": 33, "heads": 2, "kv_heads": 2, "r": 4, "alpha": 6, "targets": MLP, "rslora": True,
        "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 2}, "B": 2, "T": 5,
    },
    "lora_attention_bias__own": {
        "part": "attn", "d": 24, "ff": 40, "heads": 4, "kv_heads": 2, "r": 2, "alpha": 4, "attention_bias": True,
        "targets": ["q_proj", "v_proj"], "B": 2, "T": 4, "lens": [4, 2],
    },
}  # fmt: skip


def module_of(hp: dict) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=hp["d"],
        intermediate_size=hp["ff"],
        num_attention_heads=hp["heads"],
        num_key_value_heads=hp["kv_heads"],
        attention_bias=hp.get("attention_bias", False),
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    block = {
        "mlp": lambda: llama.LlamaMLP(config),
        "attn": lambda: llama.LlamaAttention(config, 0),
        "layer": lambda: llama.LlamaDecoderLayer(config, 0),
    }[hp["part"]]()
    block.rotary = llama.LlamaRotaryEmbedding(config)
    lora = peft.LoraConfig(
        r=hp["r"],
        lora_alpha=hp["alpha"],
        target_modules=hp["targets"],
        use_rslora=hp.get("rslora", False),
        rank_pattern=hp.get("rank_pattern", {}),
        alpha_pattern=hp.get("alpha_pattern", {}),
    )
    peft.inject_adapter_in_model(lora, block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
        parameter.requires_grad_()
    return block.eval()


def mask_of(hp: dict) -> torch.Tensor:
    """Additive: causal, and no key past a row's length."""
    B, T = hp["B"], hp["T"]
    visible = torch.ones(T, T).tril().bool()[None] & (
        torch.arange(T)[None, None] < torch.tensor(hp["lens"])[:, None, None]
    )
    return torch.zeros(B, 1, T, T).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)


def write(case: str, hp: dict, seed: int) -> None:
    torch.manual_seed(seed)
    block = module_of(hp)
    x = torch.randn(hp["B"], hp["T"], hp["d"], requires_grad=True)
    tensors = {"in.x": x}
    if hp["part"] == "mlp":
        y = block(x)
    else:
        position_ids = torch.arange(hp["T"])[None].expand(hp["B"], -1).contiguous()
        cos, sin = block.rotary(x, position_ids)
        mask = mask_of(hp)
        y = block(x, attention_mask=mask, position_embeddings=(cos, sin))
        y = y[0] if hp["part"] == "attn" else y
        tensors |= {"in.position_ids": position_ids, "in.attention_mask": mask, "out.cos": cos, "out.sin": sin}
    cot = torch.randn_like(y)
    (y * cot).sum().backward()
    tensors |= {"out.y": y, "cot.y": cot, "grad_in.x": x.grad}
    tensors |= {f"param.{name}": parameter for name, parameter in block.named_parameters()}
    tensors |= {f"grad_param.{name}": parameter.grad for name, parameter in block.named_parameters()}
    metadata = {
        "case": case,
        "module": {"mlp": "lora.mlp", "attn": "lora.attention", "layer": "lora.llama_layer"}[hp["part"]],
        "kind": "lora_llama_layer",
        "set": "own",
        "upstream": "huggingface/peft",
        "commit": peft.__version__,
        "source_file": "transformers/models/llama/modeling_llama.py",
        "hyperparameters": json.dumps(hp),
        "no_cotangent": json.dumps([n.removeprefix("out.") for n in tensors if n in ("out.cos", "out.sin")]),
        "seed": str(seed),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(__file__).with_name(case + ".safetensors"), metadata)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, (case, hp) in enumerate(CASES.items()):
        write(case, hp, seed=20350 + number)
