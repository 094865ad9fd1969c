"""Tests of surgery.patterns."""
