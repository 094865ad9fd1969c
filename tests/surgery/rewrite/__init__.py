"""Tests of surgery.rewrite."""
