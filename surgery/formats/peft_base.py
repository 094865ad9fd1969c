"""Say how PEFT's files hold what of the base was trained along: heads, biases, rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.peft_keys import left_by_peft
from surgery.formats.peft_lora import PREFIX

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's ``task_type`` for a model, by the end of its class's name."""
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and not two else task


def added_tensors(
    model: nn.Module,
    config: Mapping[str, Any],
    kept: Mapping[str, Tensor],
    rows: Mapping[str, tuple[list[int], Tensor]],
    updated: Iterable[str],
    gather: Callable[[Tensor], Tensor],
    inserted: Collection[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return entries of the config and tensors for what of the base was trained along.

    Args:
        kept: parameters of the base by name, with the values that the adapter has for them.
        rows: the numbers of rows of such parameters, and their values.
        inserted: the paths of the modules that are no part of the base.

    Raises:
        SpliceError: something has no place beside this method in that format.
    """
    is_lora = config["peft_type"] == "LORA"
    prefix = PREFIX if config["peft_type"] in ("LORA", "IA3") else "base_model."
    biases = [n for n in kept if n.endswith(".bias") and f"{n[:-4]}weight" not in kept]
    modules = _whole_modules(model, [name for name in kept if name not in biases], inserted)
    if (biases or rows) and not is_lora:
        first = [*biases, *rows][0]
        raise SpliceError(
            f"PEFT's format has no place for {first} beside {config['peft_type']}. Save in the own "
            "format: leave format= out."
        )
    if both := next((name for name in rows if name in kept), None):
        raise SpliceError(
            f"PEFT's format holds {both} whole or rows of it, and both were trained. Save in the "
            "own format: leave format= out."
        )
    modules += _tied_modules(model, modules, inserted)
    every = [path for path, _ in model.named_modules()]
    found: dict[str, Any] = {"modules_to_save": _short(every, modules, "") or None}
    tensors = {}
    for path in modules:
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items():
            whole = f"{path}.{name}"
            if not whole.startswith(tuple(f"{own}." for own in inserted)):
                tensors[f"{prefix}{whole}"] = gather(kept.get(whole, tensor))
    own = dict(model.named_parameters())
    if biases:
        own_layers = {key.removeprefix(prefix).partition(".lora_")[0] for key in updated}
        inside = [name.removesuffix(".bias") in own_layers for name in biases]
        found["bias"] = "lora_only" if all(inside) else "all"
        for name, adapted in zip(biases, inside, strict=True):
            path = name.removesuffix(".bias")
            tensors[f"{prefix}{path}{'.base_layer' * adapted}.bias"] = gather(own[name])
    for name, (numbers, values) in rows.items():
        path = _path_for_rows(model, name)
        found.setdefault("trainable_token_indices", {})[path] = numbers
        tensors[f"{prefix}{path}.token_adapter.trainable_tokens_delta"] = values
    return found, tensors


def _path_for_rows(model: nn.Module, name: str) -> str:
    """Return the path of the module whose rows PEFT changes as those of a parameter here.

    Raises:
        SpliceError: other modules have that parameter, too, and PEFT would leave theirs.
    """
    table = model.get_parameter(name)
    every = model.named_parameters(remove_duplicate=False)
    paths = [alias.rpartition(".")[0] for alias, own in every if own is table]
    path = next((p for p in paths if not left_by_peft(model, p, table)), None)
    if path is None:
        raise SpliceError(
            f"PEFT's format has no place for rows of {name}, which is tied: PEFT would change them "
            f"in one of {', '.join(paths)} alone. Save in the own format: leave format= out."
        )
    return path


def _whole_modules(model: nn.Module, names: Iterable[str], inserted: Collection[str]) -> list[str]:
    """Return the largest modules of which every parameter is among these names, which they cover.

    Raises:
        SpliceError: a name belongs to a module of which other parameters are not among them.
    """
    left = dict.fromkeys(names)
    chosen = []
    for path, module in model.named_modules():
        own = [f"{path}.{n}" for n, _ in module.named_parameters()] if path else []
        own = [n for n in own if not n.startswith(tuple(f"{each}." for each in inserted))]
        if own and all(name in left for name in own):
            chosen.append(path)
            for name in [n for n in left if n.startswith(f"{path}.")]:
                del left[name]
    if left:
        raise SpliceError(
            f"PEFT's format has no place for {next(iter(left))}: it holds modules whole, and other "
            "parameters of that module were not trained along. Keep the module, or save in the own "
            "format: leave format= out."
        )
    return chosen


def _tied_modules(model: nn.Module, modules: Sequence[str], inserted: Collection[str]) -> list[str]:
    """Return the other modules that hold just a weight of these; PEFT would untie them.

    Each is written with the same weight, so they stay alike.

    Raises:
        SpliceError: such a module holds parameters that were not trained along.
    """
    own = {id(p) for path in modules for p in model.get_submodule(path).parameters()}
    inside = tuple(f"{path}." for path in [*modules, *inserted])
    found = []
    for path, module in model.named_modules():
        outside = path not in (*modules, *inserted) and not path.startswith(inside)
        if not outside or not any(id(p) in own for p in module.parameters(recurse=False)):
            continue
        if any(id(p) not in own for p in module.parameters(recurse=False)):
            raise SpliceError(
                f"PEFT's format has no place for a weight of {', '.join(modules)} that is tied to "
                f"{path}, of which other parameters were not trained along: PEFT would untie them. "
                "Keep that module, too, or save in the own format: leave format= out."
            )
        found.append(path)
    return found


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return names that choose just these modules where PEFT compares the ends of paths."""
    return _short([path for path, _ in model.named_modules()], paths, ".")


def short_parameters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return names that choose just these parameters where PEFT compares the ends of names."""
    return _short([name for name, _ in model.named_parameters()], names, ".")


def _short(every: list[str], paths: Iterable[str], before: str) -> list[str]:
    wanted = set(paths)
    found: dict[str, None] = {}
    for path in wanted:
        last = path.rpartition(".")[2]
        alike = {p for p in every if p == last or p.endswith(f"{before}{last}")}
        found[last if alike <= wanted else path] = None
    return sorted(found)
