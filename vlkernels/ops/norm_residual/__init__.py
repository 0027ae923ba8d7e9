from ...op import Op

norm_residual = Op(__name__, saves=("x", "weight", "bias", "seed", "stats"), like={"branch": 0})
