"""Writes the goldens `lora_*__own.safetensors` of this folder by running peft: `python tests/goldens/make_lora.py`.

They cover what the public files leave out: adapter biases, three adapters, rsLoRA on Conv1D.
"""

import copy
import json
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

CASES = {
    "lora_linear_lora_bias__own": {
        "in": 21,
        "out": 18,
        "bias": True,
        "x": [2, 7, 21],
        "adapters": {"default": {"r": 5, "lora_alpha": 3, "lora_bias": True}},
    },
    "lora_linear_three_adapters__own": {
        "in": 13,
        "out": 20,
        "bias": True,
        "x": [4, 3, 13],
        "adapters": {
            "x": {"r": 2, "lora_alpha": 4},
            "y": {"r": 17, "lora_alpha": 8, "use_rslora": True},
            "z": {"r": 4, "lora_alpha": 1, "lora_bias": True},
        },
    },
    "lora_conv1d_rslora__own": {
        "in": 15,
        "out": 27,
        "base": "conv1d",
        "x": [3, 4, 15],
        "adapters": {"default": {"r": 6, "lora_alpha": 3, "use_rslora": True}},
    },
}


def layer_of(hp: dict) -> nn.Module:
    """peft's layer with all adapters active and every parameter random and trainable."""
    conv1d = hp.get("base") == "conv1d"
    base = Conv1D(hp["out"], hp["in"]) if conv1d else nn.Linear(hp["in"], hp["out"], bias=hp["bias"])
    model = nn.ModuleDict({"layer": base})
    for name, options in hp["adapters"].items():
        config = peft.LoraConfig(target_modules=["layer"], fan_in_fan_out=conv1d, **options)
        peft.inject_adapter_in_model(config, model, name)
    layer = model["layer"]
    layer.set_adapter(list(hp["adapters"]))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_()
    return layer.eval()


def write(case: str, hp: dict, seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer_of(hp)
    x = torch.randn(hp["x"], requires_grad=True)
    y = layer(x)
    cot = torch.randn_like(y)
    (y * cot).sum().backward()
    merged = copy.deepcopy(layer)
    merged.merge()
    outputs = {"y": y, "merged_weight": merged.base_layer.weight}
    outputs |= {f"delta_weight.{name}": layer.get_delta_weight(name) for name in hp["adapters"]}

    tensors = {"in.x": x, "grad_in.x": x.grad, "cot.y": cot}
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    tensors |= {f"param.{name}": value for name, value in layer.state_dict().items()}
    tensors |= {f"grad_param.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    metadata = {
        "case": case,
        "module": "lora.conv1d" if hp.get("base") == "conv1d" else "lora.linear",
        "kind": "lora_linear",
        "set": "own",
        "upstream": "huggingface/peft",
        "commit": peft.__version__,
        "source_file": "peft/tuners/lora/layer.py",
        "class": "layer.Linear",
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
        write(case, hp, seed=20250 + number)
