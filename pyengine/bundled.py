from pathlib import Path
def bundled_model() -> Path:
    return Path(__file__).parent / "data" / "smolmoe-32x8-q4_0.gguf"
