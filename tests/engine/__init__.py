"""The engine against stock llama.cpp: exactness, residency, loading, memory, failures, threads."""
