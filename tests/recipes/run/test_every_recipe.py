"""Every shipped recipe is built and runs one batch on a tiny model of its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import surgery
from surgery_recipes.recipe_files import find_recipe, read_recipe, shipped_recipes
from surgery_recipes.run import finetune
from surgery_recipes.run.build import planned_methods
from tests.recipes import tiny

ROWS = [name for name in shipped_recipes() if "/" in name]


PAPERS = {
    "adapter": 2_019_600, "lora": 2_009_088, "mam_adapter": 2_001_096, "inducer": 2_003_472,
    "inducer_lora": 2_002_320, "mam_inducer": 2_001_816, "adaptive": 2_015_424,
    "extension": 1_928_448, "gating": 2_003_472, "prefix_none": 1_990_656,
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.few(24)
def test_a_recipe_is_built_and_runs_one_batch(name: str, root: Path, tmp_path: Path) -> None:
    task = name.split("/")[0]
    model, data = tiny.prepared(task, root)
    recipe = read_recipe(find_recipe(name), tiny.overrides(task, model, data, tmp_path / "run"))
    assert 0 < finetune.dry_run(recipe, Console(quiet=True)) < 20
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_whose_method_is_not_installed_says_so() -> None:
    with pytest.raises(surgery.MethodError, match=r"no method 'lore'\. Did you mean 'lora'\?"):
        planned_methods(read_recipe(find_recipe("sst2/lora"), ["splice=[{method: lore}]"]))


def papers_rows() -> Iterator[object]:
    """Each row; those whose methods other rows have too are in the slow tier."""
    for row, count in PAPERS.items():
        quick = row in ("inducer", "lora", "prefix", "adapter")
        yield pytest.param(row, count, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("row", "count"), papers_rows())
def test_a_row_has_the_papers_number_of_parameters(row: str, count: int) -> None:
    import transformers as tr

    model = tr.GPT2LMHeadModel(tr.GPT2Config(n_layer=1))
    for index, (method, _) in enumerate(planned_methods(read_recipe(find_recipe(f"webnlg/{row}")))):
        surgery.splice(model, method, name=f"step{index}")
    assert surgery.summary(model).inserted * 12 == count
