"""Make the small models with random weights on which a method is checked.

    fused            a decoder with a fused projection of query, key and value, learned positions
    grouped          a decoder with grouped heads, rotary positions, a gated FFN and no bias
    encoder          an encoder with its norms behind the residual
    eager            the decoder ``fused`` with its softmax in sight: it has the port ``weights``
    encoder_decoder  an encoder, and a decoder that attends to it
    vision           an encoder of images

The first three are the default; the others serve a method that suits none of them.

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY, PAD = 50, 0
SHAPES = ("fused", "grouped", "encoder")
MORE_SHAPES = ("eager", "encoder_decoder", "vision")
_NO_CACHE = {"cached": "the model has no cache of its own tokens"}
_NO_TOKENS = {"padding": "the inputs are not token ids with a mask", **_NO_CACHE}


@dataclass(frozen=True)
class Shape:
    """A model to check a method on, with the inputs of a call.

    Attributes:
        name: the name in reports.
        make: returns the model in evaluation mode, with the same weights at every call.
        inputs: the keyword arguments of a call, with two rows.
        lacks: the laws that do not apply to the model, with the reason.
        sides: where a row of tokens can be padded: ``right``, ``left``.

    Example:
        ``Shape("mine", make_mine, {"x": torch.randn(2, 9, 32)})``
    """

    name: str
    make: Callable[[], Any]
    inputs: Mapping[str, Any]
    lacks: Mapping[str, str] = field(default_factory=lambda: dict(_NO_TOKENS))
    sides: tuple[str, ...] = ()


def shape_of(shape: str | Shape) -> Shape:
    """Return a shape by its name.

    Raises:
        AssertionError: there is no shape of that name.
    """
    if isinstance(shape, Shape):
        return shape
    known = (*SHAPES, *MORE_SHAPES)
    assert shape in known, f"no shape {shape!r}. Shapes: {', '.join(known)}; or pass a Shape."
    inputs: dict[str, Any] = {"input_ids": token_ids()}
    lacks: dict[str, str] = {}
    sides: tuple[str, ...] = ("right", "left")
    if shape == "encoder":
        lacks, sides = _NO_CACHE, ("right",)
    elif shape == "encoder_decoder":
        inputs["decoder_input_ids"], lacks, sides = token_ids()[:, :5], _NO_TOKENS, ()
    elif shape == "vision":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inputs, lacks, sides = {"pixel_values": pixels}, _NO_TOKENS, ()
    return Shape(shape, lambda: make_model(shape), inputs, lacks, sides)


def token_ids() -> Tensor:
    """Return token ids (2, 9), none of them special."""
    return torch.arange(18).reshape(2, 9) * 7 % (VOCABULARY - 3) + 3


def make_model(shape: str, width: int = 32, heads: int = 4, layers: int = 2, seed: int = 0) -> Any:
    """Return a small model with random weights, in evaluation mode.

    Args:
        shape: a name from the top of this file.
        width: the model width D, a multiple of ``heads``; d is even.
        heads: the number of heads H; ``grouped`` has half as many key heads, if there are several.
    """
    import transformers as tr

    library: Any = tr
    torch.manual_seed(seed)
    special: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    ffn = width + width // 2
    if shape in ("fused", "eager"):
        sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": heads}
        sizes["n_positions"] = 32
        if shape == "eager":
            sizes["attn_implementation"] = "eager"
        config = library.GPT2Config(vocab_size=VOCABULARY, **sizes, **special)
        return library.GPT2LMHeadModel(config).eval()
    if shape == "encoder_decoder":
        sizes = {"d_model": width, "max_position_embeddings": 40, "decoder_start_token_id": 1}
        for side in ("encoder", "decoder"):
            own = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn}
            sizes |= {f"{side}_{name}": size for name, size in own.items()}
        config = library.BartConfig(vocab_size=VOCABULARY, **sizes, **special)
        return library.BartForConditionalGeneration(config).eval()
    sizes = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads}
    if shape == "vision":
        config = library.ViTConfig(image_size=16, patch_size=4, **sizes)
        return library.ViTForImageClassification(config).eval()
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
    if shape == "grouped":
        sizes["num_key_value_heads"] = max(1, heads // 2)
        return library.LlamaForCausalLM(library.LlamaConfig(**sizes, **special)).eval()
    return library.RobertaForMaskedLM(library.RobertaConfig(**sizes, **special)).eval()
