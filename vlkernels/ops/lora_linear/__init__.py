from ...op import Op

lora_linear = Op(__name__, saves=("x", "weight", "a", "b", "bias", "lora_bias", "base", "seed", "quant", "s"))
