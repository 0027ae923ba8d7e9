from ...op import Op

_PROJECTIONS = ("weight", "a", "b", "bias", "lora_bias", "quant")

lora_mlp = Op(
    __name__,
    saves=(
        "x",
        *(f"{name}_{field}" for name in ("gate", "up", "down") for field in _PROJECTIONS),
        "norm_weight",
        "seed",
        "gate_pre",
        "up_pre",
        "gate_s",
        "up_s",
        "down_s",
        "stats",
    ),
)
