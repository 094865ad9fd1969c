"""Messages show any value in about a line, cheaply, and move no cursor."""

from __future__ import annotations

import time
from typing import Any

import pytest

from surgery.errors import StoreError, shown

LARGE = 1 << 26


@pytest.mark.parametrize(
    "value",
    [
        bytes(LARGE), bytearray(LARGE), memoryview(bytes(LARGE)), "x" * LARGE,
        [bytes(LARGE)], {"a": {"b": bytearray(LARGE)}}, {"x" * LARGE: 1}, [[0] * 10**6] * 10,
        ValueError("x" * LARGE), KeyError(bytes(LARGE)), 10**5000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_large_value_is_shown_in_a_line(value: Any) -> None:
    start = time.process_time()
    text = shown(value)
    assert len(text) < 500
    assert time.process_time() - start < 0.2


def test_control_characters_are_shown_as_escapes() -> None:
    error = StoreError("a name \x1b[31m\r\u202e\ud800 of a file\nand a second line: ü €")
    assert str(error) == "a name \\x1b[31m\\r\\u202e\\ud800 of a file\nand a second line: ü €"
    assert shown("\x1b[2J") == r"'\x1b[2J'"
