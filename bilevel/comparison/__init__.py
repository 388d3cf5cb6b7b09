"""Side by side: what is measured of each run, and the table, figures and page that are made of it."""

from bilevel.comparison.result import Comparison
from bilevel.comparison.rows import Point, Reference, Row, Step, Summary

__all__ = ["Comparison", "Point", "Reference", "Row", "Step", "Summary"]
