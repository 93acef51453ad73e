"""Files for llama.cpp and Ollama."""
