"""Weights from where they are published: Hugging Face's hub, or the link in Meta's e-mail.

Nothing here loads a model; `python -m llama.download` is the command.
"""
