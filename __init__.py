"""LayerLoom: layered, animated, clickable and steerable video; imports nothing heavy."""

__version__ = "0.1.0"
