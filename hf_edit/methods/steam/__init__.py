"""STEAM: locate-and-edit with semantic anchors (arXiv 2510.10398), and the base editors that it is compared with."""

from .config import BaselineConfig, SteamConfig
from .method import Steam

__all__ = ["BaselineConfig", "Steam", "SteamConfig"]
