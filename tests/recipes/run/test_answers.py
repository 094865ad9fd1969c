"""Answers do not depend on batch or cache, end where the task says, and are made once a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run.answers import answers
from surgery_recipes.run.build import load_base, planned_methods, splice
from surgery_recipes.run.prepare import Prepared, prepare_run
from tests.recipes import tiny

QUIET = Console(quiet=True)


def build(task: str, root: Path, *more: str) -> tuple[Any, Prepared]:
    """A spliced model whose inserted parameters and head are random, so that it varies."""
    model, data = tiny.prepared(task, root)
    overrides = [*tiny.overrides(task, model, data, root / "run"), *more]
    recipe = read_recipe(find_recipe(f"{task}/inducer_lora"), overrides)
    prepared = prepare_run(recipe)
    made = load_base(prepared, 0)
    splice(made, prepared, planned_methods(recipe))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made, prepared


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("task", ["webnlg", "coqa"])
def test_a_batch_with_left_padding_is_generated_as_one_by_one(
    task: str, beams: int, root: Path
) -> None:
    model, prepared = build(task, root, f"data.beams={beams}")
    examples = prepared.examples[prepared.scored[0]]
    lengths = {len(prepared.task.prompt(e, prepared.tokenizer)["input_ids"]) for e in examples}
    assert len(lengths) > 1
    batched = answers(model, prepared.task, prepared.tokenizer, examples, 5, QUIET)
    alone = answers(model, prepared.task, prepared.tokenizer, examples, 1, QUIET)
    assert batched == alone
    assert len(set(batched)) > 1


def test_generation_with_cache_equals_choosing_each_token_afresh(root: Path) -> None:
    model, prepared = build("coqa", root)
    task, tokenizer = prepared.task, prepared.tokenizer
    for example in prepared.examples["dev"][:4]:
        prompt = task.prompt(example, tokenizer)
        ids, segments = list(prompt["input_ids"]), list(prompt["token_type_ids"])
        start = len(ids)
        while len(ids) < start + task.max_new_tokens:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids]), token_type_ids=torch.tensor([segments]))
            token = int(logits.logits[0, -1].argmax())
            if token in task.stop(tokenizer):
                break
            ids.append(token)
            segments.append(segments[-1])
        slow = " ".join(tokenizer.decode(ids[start:], skip_special_tokens=True).split())
        assert answers(model, task, tokenizer, [example], 1, QUIET) == [slow]


def test_equal_prompts_are_answered_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared = build("webnlg", root)
    example = prepared.examples["test"][0]
    rows: list[int] = []
    generate = type(model).generate

    def counting(self: Any, **inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return generate(self, **inputs)

    monkeypatch.setattr(type(model), "generate", counting)
    given = answers(model, prepared.task, prepared.tokenizer, [example] * 4, 8, QUIET)
    assert rows == [1]
    assert len(set(given)) == 1
    assert len(given) == 4


def test_an_answer_ends_at_the_first_token_that_stops(root: Path) -> None:
    model, prepared = build("webnlg", root)
    stop = prepared.tokenizer.convert_tokens_to_ids("<eos_webnlg>")
    letter = prepared.tokenizer.convert_tokens_to_ids("a")

    def scripted(**inputs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        assert stop in inputs["eos_token_id"]
        new = torch.tensor([[letter, stop, letter]]).expand(len(ids), -1)
        return torch.cat([ids, new], 1)

    model.generate = scripted
    examples = prepared.examples["test"][:2]
    assert answers(model, prepared.task, prepared.tokenizer, examples, 2, QUIET) == ["a", "a"]


@pytest.mark.parametrize("task", ["mnli", "sst2"])
def test_classes_do_not_depend_on_the_batch(task: str, root: Path) -> None:
    model, prepared = build(task, root)
    examples = prepared.examples["dev"]
    batched = answers(model, prepared.task, prepared.tokenizer, examples, 8, QUIET)
    assert batched == answers(model, prepared.task, prepared.tokenizer, examples, 1, QUIET)
