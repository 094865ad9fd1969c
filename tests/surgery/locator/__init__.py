"""Tests of surgery.locator."""
