"""Noise schedules, guidance formulas and samplers."""
