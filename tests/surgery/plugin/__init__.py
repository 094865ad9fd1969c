"""Tests of surgery.plugin."""
