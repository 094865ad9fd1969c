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
    for task in tiny.FAMILY.keys() - {"digits"}:
        extra = ["bitfit"] if tiny.FAMILY[task] == "roberta" else []
        wanted = {f"{task}/{row}" for row in [*TABLES, *ablations, *shares, *extra]}
        assert wanted == {name for name in ROWS if name.startswith(task + "/")}


def test_images_have_the_rows_that_are_defined_for_them() -> None:
    """Not prompt tuning, which needs token ids."""
    rows = "fine_tuning adapter lora bitfit inducer mam_adapter".split()
    shares = [f"prefix_{share}" for share in ("none", "layer", "simple")]
    wanted = {f"digits/{row}" for row in [*rows, *shares]}
    assert wanted == {name for name in ROWS if name.startswith("digits/")}


BASES = ("openai-community/gpt2", "FacebookAI/roberta-base", "HuggingFaceTB/SmolLM2", "package:")
BASES += ("./bases/vit_digits",)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_loads_says_what_it_is_and_opens_with_its_command(name: str) -> None:
    recipe = read_recipe(find_recipe(name))
    assert recipe.about
    assert recipe.model.startswith(BASES)
    assert f"surgery train {name}" in find_recipe(name).layers[-1].read_text().split("model:")[0]
