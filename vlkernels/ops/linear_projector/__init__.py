from ...op import Op

linear_projector = Op(__name__, saves=("x", "weight", "bias", "norm_weight", "norm_bias", "stats"))
