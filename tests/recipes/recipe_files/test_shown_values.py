"""A value in an error is at most a line, whatever it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from surgery_recipes.recipe_files.shown_values import LINE, reason, short, shown


@given(st.recursive(st.text() | st.integers(), lambda below: st.lists(below, max_size=30)))
def test_a_value_is_one_line(value: object) -> None:
    assert len(shown(value)) <= LINE
    assert "\n" not in shown(value)


def test_a_short_value_is_shown_whole() -> None:
    entry = {"method": "lora", "rank": 8, "ports": ["query", "value"]}
    assert shown(entry) == repr({key: entry[key] for key in sorted(entry)})
    assert shown("it's") == repr("it's")
    assert short("a\nb  c") == "a b c"


def test_a_long_value_is_cut() -> None:
    assert "xxx...xxx" in shown("x" * 10**6)
    assert short("x" * 10**6).endswith("xxx ...")
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) <= LINE
    assert len(reason(ValueError("x" * 10**6))) < 500
    assert reason(KeyError("a")) == "KeyError: 'a'"
