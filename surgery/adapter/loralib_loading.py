"""Load a LoRA that loralib has saved: a state dict of A and B, without a word on its scale."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter.loading import bound, load_opened
from surgery.adapter.opening import described
from surgery.errors import StoreError
from surgery.formats import Foreign, contents, from_layers, tensors_in
from surgery.interop import outside_inference_mode
from surgery.locator import locate
from surgery.splicer import require_free


@outside_inference_mode
def load_loralib(
    model: nn.Module,
    file: str | os.PathLike[str],
    alpha: float,
    enabled: Sequence[bool] = (True, False, True),
    name: str = "default",
    example_inputs: Any = None,
    keep: Sequence[str] = (),
) -> nn.Module:
    """Splice a LoRA into a base model, in place, from a file of loralib's ``lora_state_dict``.

    Everything else in the file, such as a head, replaces the base's own.

    Args:
        model: the base that it was made for.
        file: a file that ``torch.save`` has written, of which tensors alone are unpickled, or one
            with the ending ``.safetensors``.
        alpha: ``lora_alpha``, which such a file does not hold.
        enabled: ``enable_lora`` of its ``MergedLinear`` layers: which of the equal parts of a fused
            projection are updated, as query, key and value.
        name, example_inputs, keep: as for :func:`surgery.load`.

    Returns:
        the model.

    Raises:
        StoreError: the file is missing or damaged, or does not fit the model. Nothing has changed.
        SpliceError: a splice of that name is there already. Nothing has changed.

    Example:
        ``surgery.load_loralib(model, "lora.pt", alpha=32)``
    """
    require_free(model, name)
    path = Path(file)
    data = contents(path, bound(model))
    if data is None:
        raise StoreError(f"{path}: there is no such file.")
    sites = locate(model, example_inputs)
    foreign = Foreign(str(path), {}, tensors_in(data, path))
    found = described(model, from_layers(foreign, sites, alpha, list(enabled)), name)
    load_opened(model, (*found, sites), path, keep=keep)
    return model
