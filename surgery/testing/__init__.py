"""Check that a method keeps the contract of all methods, in one call for its author's tests."""

from surgery.testing.check import Contract, check_method
from surgery.testing.laws import LAWS, Law
from surgery.testing.shapes import MORE_SHAPES, SHAPES, Shape, make_model
from surgery.testing.strategies import batches, models, sites

__all__ = [
    "LAWS",
    "MORE_SHAPES",
    "SHAPES",
    "Contract",
    "Law",
    "Shape",
    "batches",
    "check_method",
    "make_model",
    "models",
    "sites",
]
