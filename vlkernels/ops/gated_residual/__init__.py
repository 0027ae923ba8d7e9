from ...op import Op

gated_residual = Op(
    __name__,
    saves=("gate", "branch", "inner", "weight", "row_mask", "norm_weight", "norm_bias", "seed", "y", "stats"),
    like={"x": 0},
)
