"""pyengine.Llama as a drop-in for llama_cpp.Llama: the same calls, the same answers."""
