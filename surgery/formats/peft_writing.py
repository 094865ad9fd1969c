"""Say what PEFT's two files hold for what is spliced into a model: a config and tensors.

    lora      LORA              as many modules as have an update, a fused projection being one
    dora      LORA with use_dora, likewise
    ia3       IA3
    prefix    PREFIX_TUNING     with ``shift``, as PEFT moves positions; keys and values alone
    prompt    PROMPT_TUNING     rows alone
    full      modules_to_save   beside one of these
    tokens    trainable_token_indices   beside lora

What has no place in that format is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.own_heads import OWN as HEADS
from surgery.formats.own_heads import as_base_tensors
from surgery.formats.own_tokens import OWN as TOKENS
from surgery.formats.own_tokens import rows_with_own
from surgery.formats.peft_base import added_tensors, task_of
from surgery.formats.peft_write_modules import ia3_files, lora_files
from surgery.formats.peft_write_tables import prefix_files, prompt_files
from surgery.interop import huggingface
from surgery.splicer import Inserted, Report
from surgery.splicer import reports as every

_WRITERS: dict[str, Callable[[nn.Module, Report, Any], tuple[dict[str, Any], dict[str, Tensor]]]]
_WRITERS = {
    "lora": lora_files,
    "dora": lora_files,
    "ia3": ia3_files,
    "prefix": prefix_files,
    "prompt": prompt_files,
}


def as_peft(
    model: nn.Module,
    reports: Mapping[str, Report],
    kept: Mapping[str, Tensor],
    rows: Mapping[str, list[int]],
    gather: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of an adapter in PEFT's format.

    Args:
        model: the spliced model.
        reports: what is spliced into it.
        kept, rows: what of its base was trained along.
        gather: returns the values of a parameter, whole and on the CPU.

    Raises:
        SpliceError: something has no place in that format.
    """
    report, name, heads, tokens = _only(reports)
    config, tensors = _WRITERS[name](model, report, gather)
    own = as_base_tensors(model, heads)
    all_rows = rows_with_own(model, rows, tokens, gather)
    inserted = [i.path for each in every(model).values() for i in each.inserted]
    base, more = added_tensors(model, config, {**kept, **own}, all_rows, tensors, gather, inserted)
    config = {
        "peft_type": config.pop("peft_type"),
        "task_type": _task(model, base),
        "base_model_name_or_path": huggingface.name_or_path(model),
        "inference_mode": True,
        **config,
        **base,
    }
    return config, tensors | more


def _only(reports: Mapping[str, Report]) -> tuple[Report, str, list[Inserted], list[Inserted]]:
    """Return the one method of a splice that a folder of PEFT can hold; heads, rows beside it."""
    methods = {(r.name, m.name) for r in reports.values() for m in r.methods}
    if len(reports) == 1 and {name for _, name in methods} - {HEADS, TOKENS}:
        methods = {pair for pair in methods if pair[1] not in (HEADS, TOKENS)}
    for splice, method in sorted(methods):
        if method not in _WRITERS:
            raise SpliceError(
                f"PEFT's format has no place for {method!r} (splice {splice!r}). It has one for "
                f"{', '.join(_WRITERS)}. Save in the own format: leave format= out."
            )
    if len(methods) > 1:
        listed = ", ".join(f"{method!r} of splice {splice!r}" for splice, method in sorted(methods))
        raise SpliceError(
            f"a folder of PEFT holds one method, and this model has {listed}. Remove the others "
            "from a copy of the model, or save in the own format: leave format= out."
        )
    report, ((_, name),) = next(iter(reports.values())), methods
    alike = tuple(m for m in report.methods if m.name == name)
    if len(alike) > 1:
        raise SpliceError(f"splice {report.name!r} has {name!r} several times.")
    inserted = [i for i in report.inserted if i.method.name == name]
    heads = [i for i in report.inserted if i.method.name == HEADS]
    tokens = [i for i in report.inserted if i.method.name == TOKENS]
    return dataclasses.replace(report, methods=alike, inserted=inserted), name, heads, tokens


def _task(model: nn.Module, base: Mapping[str, Any]) -> str | None:
    """Return the ``task_type``; None where PEFT would look for a head that was not trained."""
    task = task_of(model)
    heads = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    return None if task in heads and not base.get("modules_to_save") else task
