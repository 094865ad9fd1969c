"""Check that a method keeps the contract of all methods, in one call for its author's tests."""

from surgery.testing.check import Contract, check_method
from surgery.testing.laws import LAWS, Law
from surgery.testing.models import MORE_SHAPES, SHAPES, Shape, make_model

__all__ = [
    "LAWS",
    "MORE_SHAPES",
    "SHAPES",
    "Contract",
    "Law",
    "Shape",
    "check_method",
    "make_model",
]
