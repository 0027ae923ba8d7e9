from ...op import Op

linear_projector = Op(
    __name__,
    saves=("x", "weight", "bias", "norm_weight", "norm_bias", "position", "position_index", "index", "stats"),
    parts={"weight": "parts"},
    like={"into": 0},  # the text embeddings are not kept: their gradient looks like the output's
)
