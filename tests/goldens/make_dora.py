"""Writes the goldens `dora_*__own.safetensors` of this folder by running peft: `python tests/goldens/make_dora.py`.

Several DoRA adapters in turn with rsLoRA, Conv1D, and a whole LlamaMLP.
"""

import copy
import json
from pathlib import Path

import peft
import torch
import transformers
from make_lora import layer_of
from safetensors.torch import save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

CASES = {
    "dora_linear_two_adapters__own": {
        "in": 21,
        "out": 18,
        "bias": True,
        "x": [2, 7, 21],
        "adapters": {
            "a": {"r": 5, "lora_alpha": 3, "use_dora": True},
            "b": {"r": 17, "lora_alpha": 4, "use_dora": True, "use_rslora": True},
        },
    },
    "dora_linear_rslora_r40__own": {
        "in": 26,
        "out": 33,
        "bias": False,
        "x": [4, 26],
        "adapters": {"default": {"r": 40, "lora_alpha": 4, "use_dora": True, "use_rslora": True}},
    },
    "dora_conv1d__own": {
        "in": 15,
        "out": 27,
        "base": "conv1d",
        "x": [3, 4, 15],
        "adapters": {"default": {"r": 6, "lora_alpha": 3, "use_dora": True}},
    },
    "dora_mlp__own": {
        "part": "mlp",
        "d": 24,
        "ff": 34,
        "heads": 4,
        "kv_heads": 2,
        "r": 3,
        "alpha": 6,
        "dora": True,
        "targets": ["gate_proj", "up_proj", "down_proj"],
        "B": 2,
        "T": 5,
    },
}


def mlp_of(hp: dict) -> nn.Module:
    """transformers' LlamaMLP with DoRA on its targets, every parameter random and trainable."""
    config = transformers.LlamaConfig(hidden_size=hp["d"], intermediate_size=hp["ff"], num_attention_heads=hp["heads"])
    mlp = LlamaMLP(config)
    lora = peft.LoraConfig(r=hp["r"], lora_alpha=hp["alpha"], target_modules=hp["targets"], use_dora=hp["dora"])
    peft.inject_adapter_in_model(lora, mlp)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_()
    return mlp.eval()


def write(case: str, hp: dict, seed: int) -> None:
    torch.manual_seed(seed)
    whole = "part" in hp
    module = mlp_of(hp) if whole else layer_of(hp)
    x = torch.randn([hp["B"], hp["T"], hp["d"]] if whole else hp["x"], requires_grad=True)
    y = module(x)
    cot = torch.randn_like(y)
    (y * cot).sum().backward()
    outputs = {"y": y}
    if not whole:
        merged = copy.deepcopy(module)
        merged.merge()
        outputs["merged_weight"] = merged.base_layer.weight
        outputs |= {f"delta_weight.{name}": module.get_delta_weight(name) for name in hp["adapters"]}

    tensors = {"in.x": x, "grad_in.x": x.grad, "cot.y": cot}
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    tensors |= {f"param.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"grad_param.{name}": parameter.grad for name, parameter in module.named_parameters()}
    metadata = {
        "case": case,
        "module": "dora.mlp" if whole else "dora.conv1d" if hp.get("base") == "conv1d" else "dora.linear",
        "kind": "lora_mlp" if whole else "lora_linear",
        "set": "own",
        "upstream": "huggingface/peft",
        "commit": peft.__version__,
        "source_file": "peft/tuners/lora/dora.py",
        "class": "dora.DoraLinearLayer",
        "hyperparameters": json.dumps(hp),
        "no_cotangent": json.dumps(sorted(set(outputs) - {"y"})),
        "seed": str(seed),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # autograd hands some gradients over as transposed views
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(__file__).with_name(case + ".safetensors"), metadata)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, (case, hp) in enumerate(CASES.items()):
        write(case, hp, seed=20350 + number)
