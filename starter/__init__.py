"""Small checkpoints trained by the shipped recipes."""
