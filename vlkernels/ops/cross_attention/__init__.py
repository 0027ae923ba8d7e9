from ...op import Op

cross_attention = Op(
    __name__,
    saves=(
        "q", "k", "v", "k2", "v2", "x", "kv_weight", "kv_bias", "mask", "mask2", "bias", "index", "q_norm_weight",
        "q_norm_bias", "k_norm_weight", "k_norm_bias", "seed", "y", "stats",
    ),
    parts={"x": "x_parts", "kv_weight": "kv_parts"},
)  # fmt: skip
