"""Tiny random models of other libraries, with the inputs of one forward each."""
