"""Tests of surgery.capture."""
