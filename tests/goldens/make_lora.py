"""Writes the goldens CASES of this folder by running peft: `python tests/goldens/make_lora.py`.

They cover what the public files leave out: adapter biases, three adapters, several on Conv1D, ranks above 64 and above
both widths, x of one and of four dimensions, embeddings.
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
    # more than one tile of the rank, more than either width
    "lora_linear_r72__own": {
        "in": 20,
        "out": 26,
        "bias": False,
        "x": [2, 3, 2, 20],
        "adapters": {"default": {"r": 72, "lora_alpha": 16}},
    },
    "lora_linear_1d_rslora_bias__own": {
        "in": 19,
        "out": 9,
        "bias": True,
        "x": [19],
        "adapters": {"default": {"r": 3, "lora_alpha": 2.5, "use_rslora": True, "lora_bias": True}},
    },
    "lora_conv1d_two_adapters__own": {
        "in": 18,
        "out": 35,
        "base": "conv1d",
        "x": [2, 2, 3, 18],
        "adapters": {
            "a": {"r": 5, "lora_alpha": 2, "lora_bias": True},
            "b": {"r": 33, "lora_alpha": 12, "use_rslora": True},
        },
    },
    "lora_embedding_r4__own": {
        "in": 23,
        "out": 14,
        "base": "embedding",
        "x": [3, 7],
        "adapters": {"default": {"r": 4, "lora_alpha": 6}},
    },
    "lora_embedding_two_adapters__own": {
        "in": 17,
        "out": 10,
        "base": "embedding",
        "x": [11],
        "adapters": {"a": {"r": 1, "lora_alpha": 3}, "b": {"r": 12, "lora_alpha": 5, "use_rslora": True}},
    },
    "dora_embedding_three_adapters__own": {
        "in": 19,
        "out": 12,
        "base": "embedding",
        "x": [2, 5],
        "adapters": {
            "a": {"r": 3, "lora_alpha": 4, "use_dora": True},
            "b": {"r": 2, "lora_alpha": 1},
            "c": {"r": 5, "lora_alpha": 2, "use_rslora": True, "use_dora": True},
        },
    },
}


def layer_of(hp: dict) -> nn.Module:
    """peft's layer with all adapters active and every parameter random and trainable."""
    kind = hp.get("base", "linear")
    if kind == "conv1d":
        base = Conv1D(hp["out"], hp["in"])
    elif kind == "embedding":
        base = nn.Embedding(hp["in"], hp["out"])
    else:
        base = nn.Linear(hp["in"], hp["out"], bias=hp["bias"])
    model = nn.ModuleDict({"layer": base})
    for name, options in hp["adapters"].items():
        config = peft.LoraConfig(target_modules=["layer"], fan_in_fan_out=kind == "conv1d", **options)
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
    kind = hp.get("base", "linear")
    if kind == "embedding":
        key, x = "ids", torch.randint(hp["in"], hp["x"])
    else:
        key, x = "x", torch.randn(hp["x"], requires_grad=True)
    y = layer(x)
    cot = torch.randn_like(y)
    (y * cot).sum().backward()
    merged = copy.deepcopy(layer)
    merged.merge()
    outputs = {"y": y, "merged_weight": merged.base_layer.weight}
    outputs |= {f"delta_weight.{name}": layer.get_delta_weight(name) for name in hp["adapters"]}

    tensors = {f"in.{key}": x, "cot.y": cot}
    if x.grad is not None:
        tensors["grad_in.x"] = x.grad
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    tensors |= {f"param.{name}": value for name, value in layer.state_dict().items()}
    tensors |= {f"grad_param.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    metadata = {
        "case": case,
        "module": f"{case.partition('_')[0]}.{kind}",
        "kind": "lora_linear",
        "set": "own",
        "upstream": "huggingface/peft",
        "commit": peft.__version__,
        "source_file": "peft/tuners/lora/layer.py",
        "class": "layer.Embedding" if kind == "embedding" else "layer.Linear",
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
