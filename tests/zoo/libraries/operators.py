"""Let torchvision be imported beside a torch that its compiled operators were not built with.

torchvision registers shapes of its operators when it is imported, which fails if they are missing.
No model with attention uses them, so it is enough to declare the two that it asks for.
"""

from __future__ import annotations

import importlib.util

import torch

_declared: list[torch.library.Library] = []  # a declaration ends with its object


def without_compiled_operators() -> None:
    """Declare the operators that ``import torchvision`` asks for, unless torchvision has them."""
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
