"""The QLoRA recipe trains on a base in four bits, and is read again from its run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune

STEPS = ["training.max_steps=3", "training.logging_steps=1", "training.use_cpu=true"]
STEPS += ["training.report_to=none", "training.per_device_eval_batch_size=500"]
STEPS += ["training.disable_tqdm=true", "limit={train: 64, test: 16}"]


def test_a_quantised_base_is_not_trained_without_an_adapter() -> None:
    for option in ("splice=[]", "baseline=true"):
        with pytest.raises(RecipeError, match="with adapters only"):
            read_recipe(find_recipe("qlora"), [option])
    with pytest.raises(RecipeError, match="quantize='int3' must be nf4 or int8"):
        read_recipe(find_recipe("qlora"), ["quantize=int3"])


@pytest.mark.cases
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_recipe_trains_and_scores_the_same_again(
    encoder: Path, tmp_path: Path, how: str
) -> None:
    run, console = tmp_path / "run", Console(quiet=True)
    options = [f"model={encoder}", f"output={run}", f"quantize={how}", *STEPS]
    rows = finetune.train(read_recipe(find_recipe("qlora"), options), console)
    assert [row.what for row in rows] == ["lora"]
    assert finetune.evaluate(run, console) == rows[0].scores
