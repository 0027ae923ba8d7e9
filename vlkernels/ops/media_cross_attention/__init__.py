from ...op import Op

media_cross_attention = Op(
    __name__,
    saves=("q", "k", "v", "span", "visible", "q_norm_weight", "k_norm_weight", "seed", "y", "stats"),
)
