"""Measures of generated clips: the papers' and the starters'."""
