"""Tests of surgery.interop."""
