from ...op import Op

multi_layer_kv = Op(
    __name__, saves=("x", "weight", "bias", "norm_weight", "norm_bias", "stats"), parts={"weight": "parts"}
)
