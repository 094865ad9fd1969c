"""Recipes of images: built, resumed and scored; a base or a setting for texts is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tr
from rich.console import Console

import surgery
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.build import fresh_parameters, load_base
from surgery_recipes.run.prepare import prepare_run
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe, stop_at, tensors


def test_a_recipe_trains_scores_and_is_read_again(root: Path, tmp_path: Path) -> None:
    rows = finetune.train(recipe("digits/inducer", root, tmp_path / "run"), QUIET)
    assert 0 <= rows[0].score <= 1
    assert finetune.evaluate(tmp_path / "run", QUIET) == rows[0].scores
    lines = [json.loads(x) for x in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert {line["answer"] for line in lines} <= set("0123456789")
    processor = tr.AutoImageProcessor.from_pretrained(tmp_path / "run/adapter")
    assert list(processor.image_mean) == [0.5]


def test_a_resumed_run_ends_in_the_adapter_of_an_unbroken_one(root: Path, tmp_path: Path) -> None:
    finetune.train(recipe("digits/lora", root, tmp_path / "whole"), QUIET)
    broken = recipe("digits/lora", root, tmp_path / "broken")
    stop_at(3, broken)
    finetune.train(broken, QUIET, finetune.RunOptions(resume=True))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_head_for_other_classes_makes_way_and_only_the_new_one_is_fresh(
    root: Path, tmp_path: Path
) -> None:
    prepared = prepare_run(recipe("digits/lora", root, tmp_path))
    model = load_base(prepared, 0)
    assert model.config.num_labels == 10  # the base was saved with a head of 3 classes
    assert fresh_parameters(model) == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        ("digits/lora", "model={gpt2}", "cannot classify images, as task 'digits' needs it"),
        ("sst2/lora", "model={vit}", "cannot take a classification head"),
        ("webnlg/lora", "model={vit}", "does not write text from left to right"),
        (
            "digits/lora",
            "training.train_sampling_strategy=group_by_length",
            "images have no length. Leave it out",
        ),
        ("digits/lora", "data.path=here", "no data option 'path'"),
        ("digits/lora", "model=./bases/vit_digits", "no such folder"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    name: str, more: str, part: str, root: Path, tmp_path: Path
) -> None:
    for task in ("digits", "webnlg"):
        tiny.prepared(task, root)
    more = more.format(gpt2=root / "gpt2", vit=root / "vit")
    with pytest.raises(RecipeError, match=part):
        finetune.train(recipe(name, root, tmp_path / "run", more), QUIET)
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_than_the_base_are_refused(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("digits", root)
    other = tmp_path / "model"
    tr.AutoModelForImageClassification.from_pretrained(model).save_pretrained(other)
    means = {"image_mean": [0.5], "image_std": [0.5]}
    tr.ViTImageProcessorPil(size={"height": 12, "width": 12}, **means).save_pretrained(other)
    with pytest.raises(RecipeError, match=r"the first images \(\[2, 1, 12, 12\]\) do not go"):
        finetune.train(recipe("digits/lora", root, tmp_path / "run", f"model={other}"), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_base_without_an_image_processor_is_refused(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("digits", root)
    other = tmp_path / "model"
    tr.AutoModelForImageClassification.from_pretrained(model).save_pretrained(other)
    with pytest.raises(RecipeError, match="has no image processor that loads"):
        finetune.train(recipe("digits/lora", root, tmp_path / "run", f"model={other}"), QUIET)


def test_the_frozen_base_with_a_new_head_is_a_baseline(root: Path, tmp_path: Path) -> None:
    rows = finetune.train(
        recipe("digits/bitfit", root, tmp_path / "run", "baseline=true"), Console(quiet=True)
    )
    assert [row.what for row in rows] == ["frozen base, new head", "bitfit"]
    assert rows[0].trainable == 33 * 10


def test_a_deep_visual_prompt_is_rows_of_every_layer() -> None:
    rows = 10 * 32
    config = tr.ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = tr.ViTForImageClassification(config)
    [entry] = read_recipe(find_recipe("digits/prefix_simple")).splice
    options = {key: value for key, value in entry.items() if key != "method"}
    surgery.splice(model, surgery.method(entry["method"], **options))
    assert surgery.summary(model).inserted == 2 * rows
