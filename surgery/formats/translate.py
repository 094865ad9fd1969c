"""Translate an adapter of another library for one model, by the method that it names."""

from __future__ import annotations

from torch import nn

from surgery.errors import RefusedError, StoreError
from surgery.formats.adapter_hub import adapter_hub
from surgery.formats.foreign import Foreign, Translation
from surgery.formats.own_heads import with_own_heads
from surgery.formats.own_tokens import with_own_tokens
from surgery.formats.peft_config import require_known
from surgery.formats.peft_lora import ia3, lora
from surgery.formats.peft_prompts import prefix, prompt
from surgery.plugin import Sites

_BY_TYPE = {
    "LORA": lora,
    "IA3": ia3,
    "PREFIX_TUNING": prefix,
    "PROMPT_TUNING": prompt,
    "P_TUNING": prompt,
}


def translated(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what an adapter becomes in a model with these sites.

    Raises:
        StoreError: it does not fit the model, or something in it has no place here.
    """
    try:
        if "peft_type" not in adapter.config:
            return adapter_hub(adapter, model, sites)
        found = _BY_TYPE[require_known(adapter)](adapter, model, sites)
        found = with_own_heads(found, model, sites)
        return with_own_tokens(adapter, found, model, sites)
    except StoreError:
        raise
    except RefusedError as error:  # an option that a method refuses
        raise adapter.refuse(str(error)) from error
