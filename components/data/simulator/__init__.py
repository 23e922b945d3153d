"""The platform simulator: a small coherent short-video platform whose ground truth is known."""
