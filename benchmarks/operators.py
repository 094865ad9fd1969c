"""Count the operators that a spliced model runs beside those of its base, and what it saves.

Run: python benchmarks/operators.py
Bars: of issue "fewer kernels than any peer": decode and training step, see BARS.

An operator is one that does work: views and allocations are not counted. Counts have no noise, so
the test suite asserts them (tests/test_benchmarks.py), in this process as in any.
"""
