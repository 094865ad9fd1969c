"""Turn a ``peft.PeftModel`` into its plain base with the same adapters spliced in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.loading import load_opened
from surgery.adapter.opening import described
from surgery.adapter.parameters import base_tensors
from surgery.formats import Foreign, Translation, adapters_of, base_of, translated, wrappers
from surgery.interop import outside_inference_mode
from surgery.locator import locate
from surgery.splicer import Before, atomically, use


@outside_inference_mode
def from_peft(peft_model: Any, example_inputs: Any = None, keep: Sequence[str] = ()) -> nn.Module:
    """Return the base of a PeftModel, with each of its adapters spliced in under its name.

    The base is the object inside ``peft_model``, taken out of PEFT's wrappers in place, so
    ``peft_model`` is of no use afterwards. Outputs are what they were: of several adapters those
    run that were active, and :func:`surgery.use` chooses others. Of an adapter its head (method
    ``full``) and its rows of the embedding (method ``tokens``) stay its own. To continue training,
    call ``freeze_base``, with ``keep`` for biases that were trained along.

    Args:
        peft_model: a ``peft.PeftModel`` of LoRA, IA3, prefix-tuning, prompt-tuning or P-tuning,
            with no adapter merged into it.
        example_inputs: as for :func:`surgery.locate`.
        keep: as for :func:`surgery.load`: names of modules or tensors of the base that the adapter
            may replace, such as a whole embedding.

    Returns:
        the base, spliced: a plain model of its own class.

    Raises:
        SpliceError: this is no PeftModel, or an adapter is merged into it. Nothing has changed.
        StoreError: an adapter has no place here; it is named. Or there are several, and one brings
            other tensors of the base that do not switch, as norms. Nothing has changed.

    Example:
        ``model = surgery.from_peft(peft.get_peft_model(base, peft.LoraConfig()))``
    """
    base = base_of(peft_model)
    found = list(wrappers(base))
    adapters, active = adapters_of(peft_model, found), list(peft_model.active_adapters)
    off = any(getattr(wrapper, "disable_adapters", False) for _, (_, _, wrapper, _) in found)

    def convert(before: Before) -> None:
        for _, (parent, name, _, held) in found:
            setattr(parent, name, held)
        vars(base).pop("peft_config", None)
        sites, own = locate(base, example_inputs), base_tensors(base)
        ready = {name: translated(adapter, base, sites) for name, adapter in adapters.items()}
        _require_switched(ready, own, adapters)
        brought = {name for each in ready.values() for name in (*each.kept, *each.rows)}
        before.note(own[name] for name in brought if name in own)
        for name, translation in ready.items():
            opened = (*described(base, translation, name), sites)
            load_opened(base, opened, adapters[name].where, keep=keep)
        if off or len(adapters) > 1:
            use(base, [name for name in adapters if name in active and not off])

    atomically(base, convert)
    return base


def _require_switched(
    ready: Mapping[str, Translation], own: Mapping[str, Tensor], adapters: Mapping[str, Foreign]
) -> None:
    """Raise if one of several adapters has values of a tensor of the base that the others lack.

    Raises:
        StoreError: it does, and the tensor is named.
    """
    if len(ready) == 1:
        return
    brought = {name: _replaced(each, own) for name, each in ready.items()}
    for name, tensors in brought.items():
        for what, tensor in tensors.items():
            others = (each.get(what) for each in brought.values())
            if any(other is None or not torch.equal(other, tensor) for other in others):
                raise adapters[name].refuse(
                    f"it brings its own {what}, which no method switches here, and this PeftModel "
                    f"has {len(ready)} adapters, so the others would run with it, too. Take the "
                    "others out with delete_adapter first, or save them with save_pretrained and "
                    "load each into a copy of the base."
                )


def _replaced(found: Translation, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the base that an adapter changes, as they are afterwards."""
    after = {name: tensor.to(own[name]) for name, tensor in found.kept.items() if name in own}
    for name, (numbers, rows) in found.rows.items():
        if name in own:
            after[name] = own[name].detach().clone()
            after[name][numbers] = rows.to(after[name])
    return {name: x for name, x in after.items() if not torch.equal(x, own[name])}
