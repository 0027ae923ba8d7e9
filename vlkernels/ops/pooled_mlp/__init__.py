from ...op import Op

pooled_mlp = Op(__name__, saves=("x", "w1", "w2", "b1", "b2", "pre"))
