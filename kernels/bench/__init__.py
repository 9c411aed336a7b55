"""Benchmarks of segment attention: cases, candidates, the measuring protocol, reports."""

from .cases import MASKS, SHAPES, Case, Shape, find_shape, make_mask, product
from .protocol import Candidate, Prepared, Protocol, Row, Spread, measure
from .report import CaseResult, Report

__all__ = [
    "MASKS",
    "SHAPES",
    "Candidate",
    "Case",
    "CaseResult",
    "Prepared",
    "Protocol",
    "Report",
    "Row",
    "Shape",
    "Spread",
    "find_shape",
    "make_mask",
    "measure",
    "product",
]
