from ...op import Op

dora_linear = Op(
    __name__, saves=("x", "weight", "a", "b", "magnitude", "norm", "bias", "seed", "computed_norm", "s", "u")
)
