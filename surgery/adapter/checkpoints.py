"""Let the checkpoints of transformers' Trainer hold the adapter, not the base.

    Trainer saves       model.save_pretrained(folder)         SavePretrained: the files below
    Trainer resumes     load_sharded_checkpoint(model, ...)   finds the tensors by the index, and
                        model.load_state_dict(tensors)        a hook puts them where they belong
    Trainer ends with   the same, with the best checkpoint

    surgery.json, surgery-<digest>.safetensors    what surgery.save writes, to continue training
    model.safetensors.index.json                  names the file of tensors to Trainer
    config.json                                   the base's; from_pretrained says what to call

    Trainer pushes      copies files that it knows to the run's folder, and uploads that folder;
                        complete_push has copied the adapter of the checkpoint there

``freeze_base`` puts a :class:`SavePretrained` on a transformers model, and it goes with the last
splice. Trainers that derive from Trainer, such as those of TRL, save and resume alike.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.adapter.atomic_write import write
from surgery.adapter.claims import fill
from surgery.adapter.manifest import JSON, LARGEST, parse
from surgery.adapter.parameters import base_tensors, expected, in_use_or_trained, spliced_parameters
from surgery.adapter.pushing import push
from surgery.adapter.row_training import trained_rows
from surgery.adapter.saving import save
from surgery.formats import contents
from surgery.interop import huggingface, is_first_process, is_in_parts
from surgery.splicer import atomically, look_up, record_of, reports, spliced_model

INDEX = "model.safetensors.index.json"
INSTEAD = "this is an adapter. Load its base model, then call surgery.load(model, FOLDER)"


def save_adapter_alone(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a transformers model write the adapter from now on."""
    if huggingface.is_pretrained(model) and "save_pretrained" not in vars(model):
        record_of(model).saver = SavePretrained(model)
        huggingface.follow_trainers(PUSHES)


def complete_push(model: nn.Module, checkpoint: Path, run: Path) -> None:
    """Copy the adapter of a checkpoint to the folder that ``Trainer`` pushes, which lacks its JSON.

    The adapter of the push before is replaced. Models that save themselves are left alone.
    """
    saver = vars(spliced_model(model)).get("save_pretrained")
    text = contents(checkpoint / JSON, LARGEST) if isinstance(saver, SavePretrained) else None
    if text is None:
        return
    file = parse(text, checkpoint / JSON)["tensors"]
    write(run, file, (checkpoint / file).read_bytes(), text)


def _complete(model: nn.Module, args: Any, state: Any, optimizer: Any) -> None:
    run = Path(args.output_dir)
    complete_push(model, run / f"checkpoint-{state.global_step}", run)


PUSHES = {"on_push_begin": _complete}


class SavePretrained:
    """Stands in for the ``save_pretrained`` of a model whose base is frozen.

    The reference to the model is weak, so that a model goes when its last user drops it. A copy or
    a pickle of the model has an object of its own.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        self.hook = model.register_load_state_dict_pre_hook(take_adapter)
        model.save_pretrained = self

    def remove(self) -> None:
        """Give the model its own ``save_pretrained`` back."""
        self.hook.remove()
        vars(self.model()).pop("save_pretrained", None)

    def __reduce__(self) -> Any:
        return _saver_of, (self.model(), self.hook)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapter to a folder, or the whole model if more than the adapter is trained.

        Arguments are those of ``PreTrainedModel.save_pretrained``; those that are about shards and
        formats have no meaning for an adapter.
        """
        model: Any = self.model()
        reason = _why_whole(model)
        if reason:
            warnings.warn(f"the whole model is saved, not the adapter: {reason}", stacklevel=2)
            type(model).save_pretrained(
                model, save_directory, is_main_process, state_dict, push_to_hub, **options
            )
            return
        joins = state_dict is None and any(map(is_in_parts, model.parameters()))
        if is_main_process or joins:
            names = in_use_or_trained(model)
            save(model, save_directory, plain=False, only=names, state_dict=state_dict)
        if is_main_process and (is_first_process() or not joins):
            _name_to_trainer(model, Path(save_directory))
            if push_to_hub:
                told = {"revision": "revision", "private": "private", "token": "token",
                        "commit_message": "message"}  # fmt: skip
                given = {own: options[n] for n, own in told.items() if options.get(n) is not None}
                push(model, options.get("repo_id") or Path(save_directory).name, **given)


def _saver_of(model: Any, hook: Any) -> SavePretrained:
    """Return the object for a copied or pickled model, which has its hook already."""
    saver = SavePretrained.__new__(SavePretrained)
    saver.model, saver.hook = weakref.ref(model), hook
    return saver


def _why_whole(model: nn.Module) -> str:
    """Return why an adapter would not hold all that is trained; "" if it would."""
    merged = [report.name for report in reports(model).values() if report.merged]
    if merged:
        return f"splice {merged[0]!r} is partly merged into the base."
    own = {id(parameter) for _, parameter in spliced_parameters(model)}
    chosen = {*look_up(model).kept, *trained_rows(model)}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own and name not in chosen
    ]
    if not others:
        return ""
    return (
        f"{others[0]} of the base requires a gradient. To train it with the adapter, call "
        "surgery.freeze_base(model, keep=[...])."
    )


def _name_to_trainer(model: nn.Module, folder: Path) -> None:
    """Write what Trainer needs to find an adapter, and what keeps from_pretrained from it."""
    file = json.loads((folder / JSON).read_bytes())["tensors"]
    # Every name of the model, so that Trainer misses none. Without "metadata", from_pretrained
    # raises even where it is given another config.
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), file)}))
    huggingface.save_config(model, folder, INSTEAD)


def take_adapter(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Copy the tensors of an adapter into a spliced model, for ``load_state_dict(strict=False)``.

    ``state_dict`` is left as it is if it holds the names of the model's own tensors.

    Raises:
        StoreError: these are not the tensors of what is trained here. Nothing has changed.
    """
    adapter = {k: t for k, t in state_dict.items() if k.split(".")[0] in _PARTS}
    foreign = len(adapter) < len(state_dict) or adapter.keys() & base_tensors(model).keys()
    if not adapter or foreign:
        return
    trained = {"kept": look_up(model).kept, "rows": trained_rows(model)}
    names = expected(model, adapter)
    atomically(model, lambda b: fill(model, trained, adapter, "this checkpoint", names, b))
    state_dict.clear()


_PARTS = ("inserted", "kept", "rows")
