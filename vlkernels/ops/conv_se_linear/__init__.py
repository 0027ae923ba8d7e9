from ...op import Op

conv_se_linear = Op(
    __name__,
    saves=(
        "x",
        "conv_weight",
        "fc1_weight",
        "fc1_bias",
        "fc2_weight",
        "fc2_bias",
        "weight",
        "norm_weight",
        "norm_bias",
        "out_norm_weight",
        "out_norm_bias",
        "in_norm_weight",
        "in_norm_bias",
        "shortcut",
        "means",
        "stats",
        "in_stats",
        "out_stats",
        "c",
        "d",
    ),
)
