"""Train with TRL's SFTTrainer: several examples in one row (packing), and TRL's other options.

A task writes the tokens of its examples and says by labels which of them count in the loss, so
SFTTrainer is given both and only packs them. With ``packing: true`` rows of ``max_length`` tokens
hold whole examples; positions begin anew with each, and no token sees another example's.
"""

from __future__ import annotations

from typing import Any

from surgery import RecipeError
from surgery_recipes.run.prepare import Prepared

# SFTConfig's own defaults are bfloat16 and checkpointed gradients, whatever the machine.
DEFAULTS = {"bf16": False, "gradient_checkpointing": False}


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


def make_trainer(mixin: type, model: Any, prepared: Prepared, made: Any) -> Any:
    """An SFTTrainer that also is what ``mixin`` says, for the features of a recipe.

    SFTTrainer rounds the adapters of a quantised base to bfloat16; here they keep their dtype.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    cls = type("AdapterSFTTrainer", (mixin, SFTTrainer), {"__doc__": "SFTTrainer for recipes."})
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    sets = {
        name: Dataset.from_list(
            [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
        )
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
