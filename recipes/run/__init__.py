"""One run of a recipe: read its data, build its model, train, score, and write the run folder."""

from surgery_recipes.run.build import planned_methods
from surgery_recipes.run.finetune import dry_run, evaluate, train
from surgery_recipes.run.harness import evaluate_by_harness
from surgery_recipes.run.model_source import what_is_imported
from surgery_recipes.run.prepare import Prepared, prepare_run
from surgery_recipes.run.run_folder import RunOptions, begun, finished, same_settings
from surgery_recipes.run.trainer import training_arguments

__all__ = [
    "Prepared",
    "RunOptions",
    "begun",
    "dry_run",
    "evaluate",
    "evaluate_by_harness",
    "finished",
    "planned_methods",
    "prepare_run",
    "same_settings",
    "train",
    "training_arguments",
    "what_is_imported",
]
