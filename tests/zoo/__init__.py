"""Tiny models of every model type that transformers lists, and the check of them all."""
