"""Qwen2 over packed sequences, and the Hugging Face folders that it is read from and saved to."""

from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2

__all__ = ["Qwen2", "Qwen2Config"]
