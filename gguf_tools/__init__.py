"""Looks into GGUF models with experts and makes others from them. Uses gguf and numpy; only
its bundles are packed by the engine itself."""
