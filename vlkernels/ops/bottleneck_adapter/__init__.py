from ...op import Op

bottleneck_adapter = Op(
    __name__,
    saves=(
        "x", "down", "up", "down_bias", "up_bias", "norm_weight", "norm_bias", "gate", "route", "seed",
    ),
    like={"base": 0, "residual": 0},
)  # fmt: skip
