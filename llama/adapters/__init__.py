"""Soft prompts and LoRA: what they are, on a model and in files."""
