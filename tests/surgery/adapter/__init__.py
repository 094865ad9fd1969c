"""Tests of surgery.adapter."""
