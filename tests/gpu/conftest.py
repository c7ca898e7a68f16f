"""Models of the grid."""

from models.fixtures import generated_model

__all__ = ["generated_model"]
