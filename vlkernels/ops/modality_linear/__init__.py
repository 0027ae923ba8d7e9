from ...op import Op

modality_linear = Op(__name__, saves=("x", "index", "w0", "w1", "w2", "w3", "b0", "b1", "b2", "b3", "gate"))
