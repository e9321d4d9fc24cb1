"""LKS, the Latent Knowledge Scalpel (arXiv 2508.03741): the base model stays frozen, a light hypernetwork rewrites the hidden
state of an entity as it passes a middle block."""

from .config import LKSConfig
from .editor import LKSEditor
from .method import LKS
from .swap import swap_entity

__all__ = ["LKS", "LKSConfig", "LKSEditor", "swap_entity"]
