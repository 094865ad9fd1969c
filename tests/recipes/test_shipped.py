"""Every shipped recipe loads, and is built and tried out on a tiny model of its architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes import finetune
from surgery_recipes.build import plan
from surgery_recipes.recipe import read_recipe
from surgery_recipes.shipped import find, shipped
from tests.recipes import tiny

ROWS = [name for name in shipped() if "/" in name]
TABLES = "fine_tuning adapter lora prefix mam_adapter inducer inducer_lora mam_inducer".split()


PAPERS = {
    "adapter": 2_019_600, "lora": 2_009_088, "mam_adapter": 2_001_096, "inducer": 2_003_472,
    "inducer_lora": 2_002_320, "mam_inducer": 2_001_816, "adaptive": 2_015_424,
    "extension": 1_928_448, "gating": 2_003_472, "prefix_none": 1_990_656,
}  # fmt: skip


def test_each_task_has_every_row_of_the_tables() -> None:
    ablations = ["adaptive", "extension", "gating"]
    shares = [f"prefix_{share}" for share in ("none", "layer", "linear", "simple")]
    for task in tiny.FAMILY:
        extra = ["bitfit"] if tiny.FAMILY[task] == "roberta" else []
        wanted = {f"{task}/{row}" for row in [*TABLES, *ablations, *shares, *extra]}
        assert wanted == {name for name in ROWS if name.startswith(task + "/")}


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_loads_says_what_it_is_and_opens_with_its_command(name: str) -> None:
    recipe = read_recipe(find(name))
    assert recipe.about
    assert recipe.model.startswith(("openai-community/gpt2", "FacebookAI/roberta-base", "package:"))
    assert f"surgery train {name}" in find(name).read_text().split("model:")[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_built_and_runs_one_batch(name: str, root: Path, tmp_path: Path) -> None:
    task = name.split("/")[0]
    model, data = tiny.prepared(task, root)
    recipe = read_recipe(find(name), tiny.overrides(task, model, data, tmp_path / "run"))
    assert 0 < finetune.dry_run(recipe, Console(quiet=True)) < 20
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_whose_method_is_not_installed_says_so() -> None:
    with pytest.raises(surgery.MethodError, match=r"no method 'lore'\. Did you mean 'lora'\?"):
        plan(read_recipe(find("sst2/lora"), ["splice=[{method: lore}]"]))


@pytest.mark.parametrize(
    ("row", "count"),
    PAPERS.items(),
)
def test_a_row_has_the_papers_number_of_parameters(row: str, count: int) -> None:
    import transformers as tr

    model = tr.GPT2LMHeadModel(tr.GPT2Config(n_layer=1))
    for index, (method, _) in enumerate(plan(read_recipe(find(f"webnlg/{row}")))):
        surgery.splice(model, method, name=f"step{index}")
    assert surgery.summary(model).inserted * 12 == count


def test_the_command_line_lists_recipes_and_names_the_nearest() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["recipes"])
    assert listed.exit_code == 0, listed.output
    assert "webnlg/inducer" in listed.output
    with pytest.raises(RecipeError, match=r"Did you mean 'webnlg/inducer'\?"):
        find("webnlg/induser")
