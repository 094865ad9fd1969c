"""Tests of surgery.attention."""
