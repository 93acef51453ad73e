"""Soft prompts and LoRA: as data, on a model and in files."""
