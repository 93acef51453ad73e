"""Any Llama, any checkpoint layout, any number of ranks."""
