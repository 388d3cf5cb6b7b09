"""Responses side by side: how that is measured, kept and shown."""

from bilevel.comparison._compare import compare
from bilevel.comparison.result import Comparison
from bilevel.comparison.rows import Point, Reference, Row, Step, Summary

__all__ = ["Comparison", "Point", "Reference", "Row", "Step", "Summary", "compare"]
