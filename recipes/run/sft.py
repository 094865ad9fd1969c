"""Train with TRL's SFTTrainer: several examples in one row (packing), and TRL's other options.

A task writes the tokens of its examples and says by labels which of them count in the loss, so
SFTTrainer is given both and only packs them. With ``packing: true`` rows of ``max_length`` tokens
hold whole examples; positions begin anew with each, and no token sees another example's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from surgery import RecipeError
from surgery_recipes.run.prepare import Prepared

COLUMNS = ("input_ids", "labels")


def config_class() -> Any:
    """TRL's ``SFTConfig``.

    Raises:
        RecipeError: TRL is not installed.
    """
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise RecipeError(
            "trainer=sft: TRL is not installed. pip install 'surgery[chat]'"
        ) from error
    return SFTConfig


def defaults(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What holds where a recipe does not say otherwise: neither bfloat16 nor checkpointing.

    SFTConfig's own defaults have both, on any machine, and cut examples at 1,024 tokens.
    """
    names = ("activation_checkpointing", "gradient_checkpointing")  # the latter in transformers < 6
    checkpointing = {} if set(names) & set(given) else {next(n for n in names if n in known): False}
    return {"bf16": False, "max_length": None, **checkpointing}


def make_trainer(ours: type, model: Any, prepared: Prepared, made: Any) -> Any:
    """An SFTTrainer that also is a Trainer of our own, for the features of a recipe.

    SFTTrainer rounds the adapters of a quantised base to bfloat16; here they keep their dtype.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    cls = type("AdapterSFTTrainer", (ours, SFTTrainer), {"__doc__": "SFTTrainer for recipes."})
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    sets = {
        name: Dataset.from_dict({key: [row[key] for row in rows] for key in COLUMNS})
        for name, rows in prepared.features.items()
    }
    trainer = cls(
        model,
        made,
        train_dataset=sets["train"],
        eval_dataset=sets.get("validation"),
        processing_class=prepared.tokenizer,
    )
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name]
    return trainer
