"""Smoke: each task end to end on real data, with tiny random models. Run:  make recipes-smoke

The models have the recipes' architectures and the real tokenizers of $SURGERY_DATA; they learn for
a few steps, answer some examples, and are scored, loaded afresh and scored again. A score says
nothing here but that it could be computed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as tr
from rich.console import Console

from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from tests.recipes import tiny

ROWS = {"webnlg": "inducer_lora", "coqa": "mam_inducer", "mnli": "inducer", "sst2": "lora"}
STEPS = 10


def main() -> int:
    """Run all four; 0 if every one learnt something and scored the same twice."""
    if "SURGERY_DATA" not in os.environ:
        print("$SURGERY_DATA is not set: name the folder with webnlg/, coqa/, mnli/ and sst2/.")
        return 1
    torch.set_num_threads(1)  # tiny models: a second thread costs more than it does
    tr.utils.logging.set_verbosity_error()
    tr.utils.logging.disable_progress_bar()
    data = Path(os.environ["SURGERY_DATA"])
    with tempfile.TemporaryDirectory() as temporary:
        for task, row in ROWS.items():
            run(task, row, data, Path(temporary))
    return 0


def run(task: str, row: str, data: Path, folder: Path) -> None:
    """Train, score and score again."""
    start = time.perf_counter()
    kind = tiny.FAMILY[task]
    if not (folder / kind).is_dir():
        tiny.save_model(kind, folder / kind, data / f"{kind}_tokenizer")
    scored = "test" if task == "webnlg" else "dev"
    overrides = [
        *(f"model={folder / kind}", f"data={data / task}", f"output={folder / task}"),
        *("device=cpu", f"limit={{train: 200, validation: 8, {scored}: 24}}", "patience=0"),
        *(f"training.max_steps={STEPS}", "training.warmup_steps=1", "training.logging_steps=1"),
        *("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=4"),
        "training.learning_rate=1e-2",
        *("training.eval_strategy=steps", "training.save_strategy=steps"),
        *(f"training.eval_steps={STEPS}", f"training.save_steps={STEPS}"),
    ]
    if task in ("webnlg", "coqa"):
        overrides.append("data.max_new_tokens=12")
    if task == "coqa":
        overrides.append("data.max_document=60")
    console = Console()
    rows = finetune.train(read_recipe(find_recipe(f"{task}/{row}"), overrides), console)
    losses = [loss for _, loss in rows[-1].losses]
    if finetune.evaluate(folder / task, Console(quiet=True)) != rows[-1].scores:
        raise SystemExit(f"{task}: loaded afresh, it scores differently.")
    if task in ("webnlg", "coqa") and sum(losses[-3:]) >= sum(losses[:3]):
        raise SystemExit(f"{task}: the loss did not fall: {losses}.")
    console.print(f"{task}: {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    sys.exit(main())
