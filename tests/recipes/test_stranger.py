"""A stranger's task, on the base class alone: it comes in by the hook, is trained and scored."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import surgery
from surgery.plugin.base_classes import Example, Features, TaskKind
from surgery.plugin.registry import Registry
from surgery_recipes import finetune
from surgery_recipes.recipe import make_recipe
from tests.recipes import tiny


@dataclass(frozen=True)
class Repeat(surgery.Task):
    """Say a letter again."""

    name: ClassVar[str] = "repeat"
    kind: ClassVar[TaskKind] = "decoder"
    metric: ClassVar[str] = "right"

    letters: str = "abcd"

    @property
    def decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": 2, "do_sample": False}

    def splits(self) -> dict[str, list[Example]]:
        letters = [{"letter": letter} for letter in self.letters]
        return {"train": letters * 8, "exam": letters}

    def encode(self, example: Example, tokenizer: Any) -> Features:
        ids = tokenizer(example["letter"] * 2)["input_ids"] + self.stop(tokenizer)
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        return {"input_ids": tokenizer(example["letter"])["input_ids"]}

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = [a == e["letter"] for a, e in zip(answers, examples, strict=True)]
        return {"right": sum(right) / len(right)}

    def source(self, example: Example) -> str:
        return str(example["letter"])

    def references(self, example: Example) -> list[str]:
        return [str(example["letter"])]


def test_a_strangers_task_is_learnt_and_scored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = types.ModuleType("surgery_repeat")
    module.register_tasks = surgery.hookimpl(lambda register: register(Repeat))
    made = Registry()
    made.load(list(entry_points(group="surgery")))
    made.add(module, "repeat")
    monkeypatch.setattr("surgery.plugin.registry.registry", lambda: made)
    model, _ = tiny.prepared("webnlg", root)
    training = {"max_steps": 60, "learning_rate": 0.02, "per_device_train_batch_size": 16}
    content = {
        "model": str(model),
        "task": "repeat",
        "data": {"letters": "xyz"},
        "splice": [{"method": "lora", "rank": 8, "ports": ["query", "value"]}],
        "keep": ["transformer.wte"],  # random ones: with them frozen there is little to learn with
        "limit": {"train": 16},
        "device": "cpu",
        "training": {**training, "report_to": "none", "disable_tqdm": True, "logging_steps": 5},
        "output": str(tmp_path / "run"),
    }
    row = finetune.train(make_recipe(content), Console(quiet=True))[-1]
    assert row.losses[-1][1] < row.losses[0][1] / 2
    assert row.scores == {"right": 1.0}
