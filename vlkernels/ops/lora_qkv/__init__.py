from ...op import Op

_PROJECTIONS = ("weight", "a", "b", "bias", "lora_bias", "quant")

lora_qkv = Op(
    __name__,
    saves=(
        "x",
        *(f"{name}_{field}" for name in "qkv" for field in _PROJECTIONS),
        "norm_weight",
        "seed",
        "q_s",
        "k_s",
        "v_s",
        "stats",
    ),
)
