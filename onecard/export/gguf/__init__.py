"""Export to llama.cpp and Ollama."""
