"""Say what an adapter of another library holds, as far as its files tell without a base."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign
from surgery.formats.peft_keys import sorted_keys
from surgery.formats.peft_lora import PREFIX
from surgery.formats.peft_prompts import TABLE

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_OPTIONS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "target_parameters", "num_virtual_tokens", "modules_to_save",
)  # fmt: skip


@dataclass(frozen=True)
class ForeignContents:
    """What an adapter of another library holds.

    Attributes:
        method: its method with the options that its config sets, in one line.
        base: the class of transformers that loads its base; "a model" if it does not say.
        base_name: the name or folder of its base, None if it does not say.
        modules: the modules that it updates.
        kept, rows: the tensors of the base that it brings, and how many rows of others.
        versions: of PEFT, as it says.
    """

    method: str
    base: str
    base_name: str | None
    modules: tuple[str, ...]
    kept: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def foreign_contents(adapter: Foreign) -> ForeignContents:
    """Return what an adapter holds.

    Raises:
        StoreError: a tensor has a name that PEFT gives none.
    """
    config = adapter.config
    kind, name = config.get("peft_type"), config.get("base_model_name_or_path")
    versions = {"peft": config["peft_version"]} if config.get("peft_version") else {}
    set_ = ", ".join(f"{n}={shown(config[n])}" for n in _OPTIONS if config.get(n))
    task = config.get("task_type")
    found = ForeignContents(
        f"{kind if isinstance(kind, str) else 'an adapter of the adapters library'}({set_})",
        _CLASSES.get(task, "a model") if isinstance(task, str) else "a model",
        name if isinstance(name, str) and name else None,
        (),
        versions=versions,
    )
    if kind is None:
        return found
    tables = TABLE in adapter.tensors
    rest = {key: x for key, x in adapter.tensors.items() if key != TABLE}
    if config.get("target_parameters"):  # a module is wrapped once for each
        rest = {key.replace("base_layer.lora_", "lora_"): x for key, x in rest.items()}
        config = {**config, "target_parameters": None}
    inner = Foreign(adapter.where, config, rest)
    keys = sorted_keys(inner, nn.Module(), "base_model." if tables else PREFIX)
    rows = {path: len(rest[key]) if rest[key].dim() else 0 for path, key in keys.rows.items()}
    return ForeignContents(
        found.method,
        found.base,
        found.base_name,
        tuple(keys.modules),
        tuple(keys.base),
        rows,
        versions,
    )
