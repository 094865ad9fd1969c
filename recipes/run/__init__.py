"""One run of a recipe: read its data, build its model, train, score, and write the run folder."""

from surgery_recipes.run.answers import pad_id
from surgery_recipes.run.build import planned_methods
from surgery_recipes.run.collate import Collator
from surgery_recipes.run.counting import Counter
from surgery_recipes.run.finetune import dry_run, evaluate, train
from surgery_recipes.run.harness import evaluate_by_harness
from surgery_recipes.run.kinds import of_images
from surgery_recipes.run.loaded import LoadedRun, load_run
from surgery_recipes.run.model_source import what_is_imported
from surgery_recipes.run.prepare import Prepared, main_score, prepare_run
from surgery_recipes.run.registry import compare_runs, find_runs
from surgery_recipes.run.resampling import draws, read_resampled
from surgery_recipes.run.run_folder import RunOptions, begun, finished, recipe_of_run, same_settings
from surgery_recipes.run.timing import Cost, cost
from surgery_recipes.run.trainer import training_arguments

__all__ = [
    "Collator",
    "Cost",
    "Counter",
    "LoadedRun",
    "Prepared",
    "RunOptions",
    "begun",
    "compare_runs",
    "cost",
    "draws",
    "dry_run",
    "evaluate",
    "evaluate_by_harness",
    "find_runs",
    "finished",
    "load_run",
    "main_score",
    "of_images",
    "pad_id",
    "planned_methods",
    "prepare_run",
    "read_resampled",
    "recipe_of_run",
    "same_settings",
    "train",
    "training_arguments",
    "what_is_imported",
]
