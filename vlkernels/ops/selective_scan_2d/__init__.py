from ...op import Op

selective_scan_2d = Op(__name__, saves=("u", "delta", "a", "b", "c", "d", "z", "delta_bias", "state", "states"))
