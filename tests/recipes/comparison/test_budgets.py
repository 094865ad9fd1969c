"""A budget of parameters is solved for the sizes of rows: the nearest count not above it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.errors import RecipeError
from surgery_recipes.comparison import compare, tables
from surgery_recipes.comparison.budgets import (
    Counts,
    apportion,
    largest_within,
    options,
    sized,
    solve,
    within_budget,
)
from surgery_recipes.comparison.grid import Grid, cells, read_grid, recipe_of
from surgery_recipes.comparison.sweep_plan import Budget, read_budget
from surgery_recipes.recipe_files import Recipe
from surgery_recipes.run import Counter, prepare_run
from surgery_recipes.run.build import load_base, planned_methods, splice
from tests.recipes import tiny
from tests.recipes.comparison.grids import QUIET, finished, grid


def small(root: Path, output: Path, rows: list[str], budget: Budget) -> Grid:
    model, data = tiny.prepared("sst2", root)
    given = [f"model={model}", f"data={data}", "data.held_out=2", "device=cpu"]
    shape: dict[str, Any] = {"rows": rows, "seeds": [1], "baseline": "", "paper": {}}
    return grid(output, given=given, budget=budget, **shape)


@pytest.mark.parametrize(
    ("row", "percent", "of"),
    [
        ("lora", 20, "trained"), ("lora", 4.1, "trained"), ("adapter", 20, "trained"),
        ("prefix", 9, "stored"), ("prefix_none", 9, "trained"), ("mam_inducer", 30, "trained"),
        ("inducer", 20, "trained"), ("extension", 20, "trained"),
    ],
)  # fmt: skip
def test_no_larger_size_is_within_the_budget(
    row: str, percent: float, of: Any, root: Path, tmp_path: Path
) -> None:
    made = small(root, tmp_path, [row], Budget(percent, of))
    recipe = recipe_of(made, cells(made)[0])
    sizes = solve(made, recipe, Counts(tmp_path / "x", trust=False), row)
    assert sizes is not None
    counter = Counter(recipe)

    def count(sizes: dict[Any, int]) -> int:
        return int(getattr(counter.count(sized(recipe, sizes)), of))

    limit = percent / 100 * counter.count(recipe).base
    assert count(sizes) <= limit
    for option in sizes:
        assert count({**sizes, option: sizes[option] + 1}) > limit
    assert set(sizes) == set(options(recipe))


def test_counts_without_weights_are_those_of_the_model(root: Path, tmp_path: Path) -> None:
    made = small(root, tmp_path, ["mam_adapter"], Budget(1))
    recipe = recipe_of(made, cells(made)[0])
    prepared = prepare_run(recipe)
    model = load_base(prepared, 0)
    splice(model, prepared, planned_methods(recipe))
    real, counted = surgery.summary(model), Counter(recipe).count(recipe)
    assert (counted.base, counted.trained) == (real.base, real.inserted)
    assert counted.stored == real.stored


def test_a_grid_shows_the_sizes_and_names_what_has_none(root: Path, tmp_path: Path) -> None:
    rows = ["base", "fine_tuning", "bitfit", "lora"]
    made = within_budget(small(root, tmp_path, rows, Budget(20)), QUIET)
    assert list(made.chosen) == ["sst2/lora"]
    [entry] = recipe_of(made, cells(made)[-1]).splice
    assert made.chosen["sst2/lora"].size == f"rank={entry['rank']}"
    assert entry["ports"] == ["query", "value"]  # the rest of the entry stays
    for cell in cells(made):
        finished(cell, 0.5)
    tables.write(made, cells(made))
    text = (tmp_path / "table.md").read_text()
    assert f"| rank={entry['rank']} |" in text
    assert "Budget: 20 % trained of the base's parameters." in text
    assert "as no option sets their size: base, fine_tuning, bitfit." in text
    assert f"rank={entry['rank']}" in (tmp_path / "table.csv").read_text()


def test_what_was_counted_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path, ["lora"], Budget(20))
    first = within_budget(made, QUIET)
    monkeypatch.setattr(Counter, "count", lambda *_: pytest.fail("counted again"))
    assert within_budget(made, QUIET).chosen == first.chosen


def test_a_row_that_does_not_fit_is_refused_before_any_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path / "grid", ["lora"], Budget(0.01))
    with pytest.raises(RecipeError, match=r"sst2/lora with rank=1 has 256 \(trained\)"):
        compare.run_grid(made, QUIET)
    assert not (tmp_path / "grid").exists()


@dataclass(frozen=True)
class Wrong(surgery.Method):
    """Names a size that is no whole number."""

    name = "wrong"
    size = ("ports",)

    ports: tuple[str, ...] = ("query",)


def test_a_size_that_is_no_whole_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "surgery_recipes.comparison.budgets.planned_methods", lambda _: [(Wrong(), {})]
    )
    with pytest.raises(RecipeError, match="names 'ports' as its size"):
        options(Recipe("", ""))


def test_every_size_of_an_installed_method_is_an_option() -> None:
    found = {name: cls.size for name, cls in surgery.methods().items() if cls.size}
    assert {"lora", "prefix", "prompt", "inducer", "ffn_adapter", "mam_adapter"} <= set(found)
    for name, size in found.items():
        made = surgery.method(name)
        assert all(type(getattr(made, option)) is int for option in size), name


@given(st.lists(st.integers(1, 600), min_size=1, max_size=5), st.integers(0, 60))
def test_shares_grow_one_at_a_time_in_proportion(weights: list[int], more: int) -> None:
    given = {(0, str(i)): w for i, w in enumerate(weights)}
    before, after = (apportion(given, len(weights) + n) for n in (more, more + 1))
    assert sum(before.values()) == len(weights) + more
    assert sorted(after[key] - before[key] for key in given) == [0] * (len(weights) - 1) + [1]


def test_shares_of_the_sum_of_a_recipe_are_the_recipes() -> None:
    given = {(0, "key_rank"): 3, (0, "value_rank"): 7, (0, "lora_rank"): 16, (0, "ffn_rank"): 42}
    assert apportion(given, 68) == given


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 10**6), st.booleans())
def test_the_search_ends_at_the_largest_number_within(
    slope: int, offset: int, more: int, curved: bool
) -> None:
    def whole(n: int) -> int:
        return offset + slope * n * (n if curved else 1)

    def count(n: int) -> int | None:
        asked.append(n)
        return None if n > 5000 else whole(n)

    asked: list[int] = []
    limit = offset + slope + more
    found = largest_within(count, 1, offset + slope, limit)
    assert whole(found) <= limit
    assert found == 5000 or whole(found + 1) > limit
    assert len(asked) <= 60


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("0.5 %", Budget(0.5)), ("0.5% stored", Budget(0.5, "stored")),
        ("2 % trained", Budget(2)),
    ],
)  # fmt: skip
def test_a_budget_is_read(text: str, made: Budget) -> None:
    assert read_budget("", text) == made


@pytest.mark.parametrize("text", [0.5, "0.5", "0 %", "200 %", "1 % of it", [1]])
def test_a_budget_that_is_none_says_how_to_write_one(text: Any, tmp_path: Path) -> None:
    lines = {"title": "a", "tasks": ["sst2"], "rows": ["lora"], "scores": {"sst2": ["accuracy"]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**lines, "budget": text}))
    with pytest.raises(RecipeError, match=r"such as 0.5 % or 0.5 % stored"):
        read_grid(tmp_path / "grid.yaml")
