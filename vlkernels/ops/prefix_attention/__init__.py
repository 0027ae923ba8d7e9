from ...op import Op

prefix_attention = Op(__name__, saves=("q", "k", "v", "gate", "factor"), like={"o": 0})
