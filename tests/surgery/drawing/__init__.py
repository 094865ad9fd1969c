"""Tests of surgery.drawing."""
