"""Checkpoints on disk: what their tensors are called, where their bytes lie, how they are loaded."""
