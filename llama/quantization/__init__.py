"""Quantization: which tensors are held as integers, the layers that hold them, and how roundings are chosen."""
