"""Tests of surgery.splicer."""
