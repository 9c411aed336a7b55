"""Sprite world, losses, the trainer and its recipes."""
