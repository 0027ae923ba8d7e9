from ...op import Op

depthwise_conv_norm_act = Op(__name__, saves=("x", "weight", "bias", "norm_weight", "norm_bias", "c", "stats"))
