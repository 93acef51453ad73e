"""CPU kernels and quantized matrices: packed formats, matrix products, shared memory between ranks."""
