"""Quantization: schemes of tensors held as integers, layers that hold them, and the choice of roundings."""
