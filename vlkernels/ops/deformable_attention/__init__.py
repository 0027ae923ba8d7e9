from ...op import Op

deformable_attention = Op(__name__, saves=("value", "points", "weights", "reference", "stats"))
