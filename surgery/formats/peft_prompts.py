"""Translate what PEFT puts in front of a sequence: prefixes, prompts, and P-tuning's prompts.

    prefix    prompt_embeddings (P, 2 L G d): of token p in layer l the keys, then the values
    prompt    prompt_embeddings (P, D)

PEFT saves no more than these tables, whatever they were made by. It puts a prefix into the KV cache
of a decoder's self-attention, where real tokens then have the positions P, P + 1, .... A model that
adds s_h j to the scores of key j (ALiBi) adds s_h (p - P) to those of prefix key p. One that adds a
number t_h(i - j) for each distance adds t_h(P + i - p). Of a decoder behind an encoder it
deals the table out in fours, for cross-attention, too, and then drops that:

    layer l    rows 4 l and 4 l + 1 of the 2 L, beginning again at the end
"""

from __future__ import annotations

from torch import Tensor, nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, Translation, option, require_shape
from surgery.formats.peft_announced import require_announced
from surgery.formats.peft_config import is_positive
from surgery.formats.peft_keys import Keys, base_tensors_of, sorted_keys
from surgery.plugin import Edit, Site, Sites, method

TABLE = "prompt_embeddings"


def _split(adapter: Foreign, model: nn.Module) -> Keys:
    """Return the names of the base's tensors that come with a table."""
    rest = {key: x for key, x in adapter.tensors.items() if key != TABLE}
    keys = sorted_keys(Foreign(adapter.where, adapter.config, rest), model, "base_model.")
    if keys.modules or keys.rows:
        raise adapter.refuse("it has a prompt and updates modules; PEFT makes no such adapter.")
    require_announced(adapter, keys, model, "base_model.")
    return keys


def _length(adapter: Foreign) -> int:
    length = option(adapter, "num_virtual_tokens", 0, int)
    if not is_positive(length):
        raise adapter.refuse(f"num_virtual_tokens is {length}.")
    return int(length)


def self_attention(sites: Sites) -> list[Site]:
    """Return the attention sites that have a KV cache of the tokens themselves, layer by layer."""
    decoder = decoders(sites)
    return [s for s in sites.attention if not s.cross and s.path.startswith(decoder)]


def decoders(sites: Sites) -> str:
    """Return the path before all that belongs to the decoder of an encoder-decoder; else ''."""
    found = [s.path for s in sites.others if s.kind == "trunk" and s.role == "decoder"]
    return f"{found[0]}." if found and found[0] else ""


def prefix(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what prefix-tuning of PEFT becomes in this model.

    Raises:
        StoreError: the model has other layers or heads, or places its tokens otherwise than by
            numbers, so that a prefix in a cache is more than keys and values.
    """
    keys, length = _split(adapter, model), _length(adapter)
    layers = self_attention(sites)
    positions = [s for s in sites.position if s.path.startswith(decoders(sites))]
    if not layers or not all("lse" in site.ports for site in layers):
        raise adapter.refuse("this model has no self-attention that can attend to a prefix.")
    if not positions and not all(site.slopes or site.distances for site in layers):
        raise adapter.refuse(
            "this model places tokens neither by numbers nor by slopes or a table of distances "
            "that could be found, so PEFT's score of a prefix's key cannot be told. Train it anew "
            "with method('prefix')."
        )
    shapes = {(s.kv_heads, s.head_width, s.value_width) for s in layers}
    groups, width, value_width = shapes.pop()
    if shapes or value_width != width:
        raise adapter.refuse("heads differ from layer to layer, and PEFT's table has one shape.")
    count = _layers(adapter, len(layers), bool(decoders(sites)))
    wanted = (length, 2 * count * groups * width)
    why = f"{length} tokens, and {count} layers of {groups} heads of {width} for keys, values"
    table = require_shape(adapter, TABLE, wanted, why)
    split = table.reshape(length, count, 2, groups, width)  # (P, L, 2, G, d)
    order = places_of_layers(count, bool(decoders(sites)))
    numbers = {site.identity: order[layer] for layer, site in enumerate(layers)}

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        layer = numbers.get((path, edit.site, edit.kind))
        if layer is None or parameter not in ("keys", "values"):
            return None
        both: Tensor = split[:, layer].permute(1, 2, 0, 3)  # (2, G, P, d)
        return both[int(parameter == "values")]

    chosen = Sites([*layers], others=positions)
    made = method("prefix", length=length, shift=True)
    return Translation([made], chosen, value, base_tensors_of(adapter, keys, model))


def places_of_layers(count: int, behind_encoder: bool) -> list[int]:
    """Return for each layer the place of its keys and values in a table of ``count`` layers."""
    return [2 * layer % count if behind_encoder else layer for layer in range(count)]


def _layers(adapter: Foreign, here: int, behind_encoder: bool) -> int:
    """Return for how many layers the table is; behind an encoder PEFT counts the encoder's."""
    submodules = option(adapter, "num_transformer_submodules", 1 + behind_encoder, int)
    if submodules != 1 + behind_encoder:
        raise adapter.refuse(
            f"num_transformer_submodules is {shown(submodules)}, for {1 + behind_encoder} here."
        )
    count = int(option(adapter, "num_layers", here, int)) if behind_encoder else here
    if count < here or count > 10_000:
        raise adapter.refuse(f"it has a prefix for {shown(count)} of {here} layers of the decoder.")
    return count


def prompt(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what prompt-tuning or P-tuning of PEFT becomes in this model.

    PEFT leaves the rows in the outputs, and the head of an encoder reads the first place. In front
    of a decoder that attends to an encoder it puts none, although its table has rows for it.

    Raises:
        StoreError: the model has another width, or embeds no token ids at one place.
    """
    keys, length = _split(adapter, model), _length(adapter)
    width = next((s.width for s in sites.others if s.kind == "embedding"), 0)
    two = bool(decoders(sites))
    count = option(adapter, "num_transformer_submodules", 2 if two else 1, int)
    if count not in ((1, 2) if two else (1,)):
        raise adapter.refuse(f"num_transformer_submodules is {shown(count)}, for {1 + two} here.")
    why = f"{count} times {length} rows of the width {width} of this model's embedding"
    table = require_shape(adapter, TABLE, (count * length, width), why)[:length]
    cut = two or all(site.causal for site in sites.attention)
    made = method("prompt", length=length, init="normal", cut=cut)

    def value(path: str, edit: Edit, parameter: str) -> Tensor | None:
        return table if parameter.endswith("rows") else None

    chosen = made.choose([*sites, *sites.others])
    attention = [s for s in chosen if s.kind == "attention"]
    others = [s for s in chosen if s.kind != "attention"]
    return Translation(
        [made], Sites(attention, others=others), value, base_tensors_of(adapter, keys, model)
    )
