"""Tests of surgery.host."""
