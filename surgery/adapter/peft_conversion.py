"""Turn a ``peft.PeftModel`` into its plain base with the same adapters spliced in."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.adapter.loading import load_opened
from surgery.adapter.opening import described
from surgery.adapter.parameters import base_tensors
from surgery.formats import adapters_of, base_of, translated, wrappers
from surgery.interop import outside_inference_mode
from surgery.locator import locate
from surgery.splicer import Before, atomically, use


@outside_inference_mode
def from_peft(peft_model: Any, example_inputs: Any = None) -> nn.Module:
    """Return the base of a PeftModel, with each of its adapters spliced in under its name.

    The base is the object inside ``peft_model``, taken out of PEFT's wrappers in place, so
    ``peft_model`` is of no use afterwards. Outputs are what they were: of several adapters those
    run that were active, and :func:`surgery.use` chooses others. A head of an adapter stays its own
    (method ``full``). To continue training, call ``freeze_base``, with ``keep`` for biases that
    were trained along.

    Args:
        peft_model: a ``peft.PeftModel`` of LoRA, IA3, prefix-tuning, prompt-tuning or P-tuning,
            with no adapter merged into it.
        example_inputs: as for :func:`surgery.locate`.

    Returns:
        the base, spliced: a plain model of its own class.

    Raises:
        SpliceError: this is no PeftModel, or an adapter is merged into it. Nothing has changed.
        StoreError: an adapter has no place here; it is named. Nothing has changed.

    Example:
        ``model = surgery.from_peft(peft.get_peft_model(base, peft.LoraConfig()))``
    """
    base = base_of(peft_model)
    found = list(wrappers(base))
    adapters, active = adapters_of(peft_model, found), list(peft_model.active_adapters)

    def convert(before: Before) -> None:
        for _, (parent, name, _, held) in found:
            setattr(parent, name, held)
        vars(base).pop("peft_config", None)
        sites, own = locate(base, example_inputs), base_tensors(base)
        ready = {name: translated(adapter, base, sites) for name, adapter in adapters.items()}
        brought = {name for each in ready.values() for name in (*each.kept, *each.rows)}
        before.note(own[name] for name in brought if name in own)
        for name, translation in ready.items():
            opened = (*described(base, translation, name), sites)
            load_opened(base, opened, adapters[name].where)
        if len(adapters) > 1:
            use(base, [name for name in adapters if name in active])

    atomically(base, convert)
    return base
