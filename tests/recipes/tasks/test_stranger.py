"""Tasks of another package come in through an entry point, are trained and scored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes import tiny

SOURCE = Path(__file__).with_name("strangers_tasks.py")
TRAIN = """
import sys
from surgery.cli import app
for recipe in sys.argv[1:]:
    app(["train", recipe], standalone_mode=False)
"""


def install(folder: Path) -> None:
    """What pip leaves of a package with these tasks: its module, and its entry point."""
    about = folder / "surgery_words-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "surgery_words.py").write_text(SOURCE.read_text())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: surgery-words\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[surgery]\nwords = surgery_words\n")


@pytest.mark.slow
def test_a_strangers_task_is_learnt_and_scored(root: Path, tmp_path: Path) -> None:
    install(tmp_path / "site")
    decoder, _ = tiny.prepared("webnlg", root)
    encoder, _ = tiny.prepared("sst2", root)
    words = tmp_path / "words"
    words.mkdir()
    (words / "words.tsv").write_text("word\nhouse\nroom\ndoor\nstairs\nroof\nwindow\n")
    small = {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 16}
    base: dict[str, Any] = {
        "splice": [{"method": "lora", "rank": 8, "ports": ["query", "value"]}],
        "device": "cpu",
        "data": {"path": str(words)},
        "training": {**small, "max_steps": 4, "logging_steps": 1},
    }
    recipes: dict[str, dict[str, Any]] = {
        "repeat": {
            "model": str(decoder),
            "data": {"letters": "xyz"},
            "keep": ["transformer.wte"],  # random ones: with them frozen there is little to learn
            "limit": {"train": 16},
            "training": {**small, "max_steps": 60, "learning_rate": 0.02, "logging_steps": 5},
        },
        "spell": {"model": str(decoder)},
        "long": {"model": str(encoder)},
    }
    for task, own in recipes.items():
        content = {**base, "task": task, "output": str(tmp_path / task), **own}
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(content))
    files = [str(tmp_path / f"{task}.yaml") for task in recipes]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", TRAIN, *files], env=environment, check=True)
    rows = {
        task: json.loads((tmp_path / task / "metrics.json").read_text())["rows"][-1]
        for task in recipes
    }
    losses = [loss for _, loss in rows["repeat"]["losses"]]
    assert losses[-1] < losses[0] / 2
    assert rows["repeat"]["scores"] == {"right": 1.0}
    assert set(rows["spell"]["scores"]) == {"right"}
    assert set(rows["long"]["scores"]) == {"accuracy"}
