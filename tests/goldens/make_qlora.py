"""Writes the 4-bit goldens `{nf4,fp4,qlora}_*__own.safetensors`: `python tests/goldens/make_qlora.py`.

They cover what the public files leave out: fp4, plain absmax, other block sizes, odd counts, outliers, zero blocks.
bitsandbytes quantises; its pure PyTorch code dequantises, for its compiled CPU code is wrong where blocks cross rows.
"""

import json
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default import ops
from safetensors.torch import save_file

CASES = {
    "nf4_odd__own": {"shape": [13, 35], "blocksize": 64, "double": True, "type": "nf4"},
    "nf4_plain_absmax__own": {"shape": [30, 50], "blocksize": 128, "double": False, "type": "nf4"},
    "fp4_ragged__own": {"shape": [40, 72], "blocksize": 256, "double": True, "type": "fp4", "outlier": True},
    "fp4_zero_block__own": {"shape": [9, 64], "blocksize": 32, "double": False, "type": "fp4", "zero_block": True},
    # more than 256 blocks: two of the nested absmax
    "nf4_nested__own": {"shape": [131, 70], "blocksize": 32, "double": True, "type": "nf4", "zero_block": True},
    "qlora_odd_r3__own": {
        "shape": [27, 33], "blocksize": 64, "double": True, "type": "nf4",
        "r": 3, "alpha": 5, "bias": False, "x": [2, 2, 3], "outlier": True,
    },
    "qlora_fp4_r5__own": {
        "shape": [22, 40], "blocksize": 32, "double": False, "type": "fp4",
        "r": 5, "alpha": 4, "bias": True, "x": [7],
    },
    "qlora_ragged_r17__own": {
        "shape": [36, 152], "blocksize": 128, "double": True, "type": "nf4",
        "r": 17, "alpha": 16, "bias": True, "x": [3, 4],
    },
}  # fmt: skip


def weight_of(hp: dict) -> torch.Tensor:
    weight = torch.randn(hp["shape"]) * 0.2
    if hp.get("outlier"):
        weight.view(-1)[5] = 7.0
    if hp.get("zero_block"):
        weight.view(-1)[hp["blocksize"] : 2 * hp["blocksize"]] = 0
    return weight


def write(case: str, hp: dict, seed: int) -> None:
    torch.manual_seed(seed)
    weight = weight_of(hp)
    packed, state = functional.quantize_4bit(
        weight, blocksize=hp["blocksize"], compress_statistics=hp["double"], quant_type=hp["type"]
    )
    absmax = state.absmax
    outputs = {"packed": packed, "absmax": absmax, "code": state.code}
    if hp["double"]:
        nested = state.state2
        absmax = functional.dequantize_blockwise(absmax, nested) + state.offset
        outputs |= {
            "nested_code": nested.code,
            "nested_absmax": nested.absmax,
            "offset": state.offset.reshape(1),
        }
    dequantise = ops._dequantize_4bit_compute.__wrapped__
    dense = dequantise(packed.flatten(), absmax, state.code, hp["blocksize"], hp["shape"], torch.float32)
    outputs["dequantized"] = dense
    tensors = {"in.weight": weight}
    if "r" in hp:
        out, width = hp["shape"]
        x = torch.randn(*hp["x"], width, requires_grad=True)
        a = torch.randn(hp["r"], width).mul(0.5).requires_grad_()
        b = torch.randn(out, hp["r"]).mul(0.5).requires_grad_()
        bias = torch.randn(out) if hp["bias"] else None
        y = F.linear(x, dense, bias) + hp["alpha"] / hp["r"] * F.linear(F.linear(x, a), b)
        cot = torch.randn_like(y)
        (y * cot).sum().backward()
        outputs["y"] = y
        names = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        tensors |= {"in.x": x, "cot.y": cot, "grad_in.x": x.grad}
        tensors |= {f"param.{name}": value for name, value in names.items()}
        tensors |= {f"grad_param.{name}": value.grad for name, value in names.items()}
        if bias is not None:
            tensors["param.base_layer.bias"] = bias
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    metadata = {
        "case": case,
        "module": "qlora.linear",
        "kind": "nf4_quant",
        "set": "own",
        "upstream": "bitsandbytes wheel",
        "commit": bitsandbytes.__version__,
        "source_file": "bitsandbytes/functional.py",
        "class": "bitsandbytes.functional",
        "hyperparameters": json.dumps(hp),
        "no_cotangent": json.dumps(sorted(set(outputs) - {"y"})),
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
