"""Tests of the whole: laws, generation and kinds of models through every package."""
