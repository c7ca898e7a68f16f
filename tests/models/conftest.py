"""Fixtures of this room."""

from .fixtures import generated_model, model_path

__all__ = ["generated_model", "model_path"]
