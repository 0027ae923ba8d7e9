from ...op import Op

mlp_projector = Op(
    __name__,
    saves=(
        "x", "w1", "w2", "b1", "b2", "norm_weight", "norm_bias", "wg", "scale", "row_mask", "pre", "stats",
    ),
)  # fmt: skip
