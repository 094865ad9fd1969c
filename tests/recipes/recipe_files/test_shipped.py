"""Every shipped recipe is found by its name, loads, and says what it is."""

from __future__ import annotations

import pytest

from surgery_recipes.recipe_files import find_recipe, read_recipe, shipped_recipes
from tests.recipes import tiny

ROWS = [name for name in shipped_recipes() if "/" in name]


TABLES = "base fine_tuning adapter lora prefix mam_adapter inducer inducer_lora mam_inducer".split()


def test_each_task_has_every_row_of_the_tables() -> None:
    ablations = ["adaptive", "extension", "gating"]
    shares = [f"prefix_{share}" for share in ("none", "layer", "linear", "simple")]
    for task in tiny.FAMILY:
        extra = ["bitfit"] if tiny.FAMILY[task] == "roberta" else []
        wanted = {f"{task}/{row}" for row in [*TABLES, *ablations, *shares, *extra]}
        assert wanted == {name for name in ROWS if name.startswith(task + "/")}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_loads_says_what_it_is_and_opens_with_its_command(name: str) -> None:
    recipe = read_recipe(find_recipe(name))
    assert recipe.about
    assert recipe.model.startswith(("openai-community/gpt2", "FacebookAI/roberta-base", "package:"))
    assert f"surgery train {name}" in find_recipe(name).layers[-1].read_text().split("model:")[0]
