from ...op import Op

prefix_attention = Op(__name__, saves=("q", "k", "v", "gate", "factor"), passes={"o": 0})
