"""Keep bitsandbytes from packing 4-bit weights, so that gradients pass a layer.

On CPUs with AVX512-BF16 a 4-bit layer packs its weight anew at the first call in evaluation mode
without a gradient. No gradient passes a packed layer, it rounds otherwise, and widths under 64
cannot be packed. The layer's own flag says whether it may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.interop.patching import OwnValue

_FLAG, _MARK = "support_avx512bf16_for_cpu", "_surgery_unpacked"


def _packing(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [m for m in modules if vars(m).get(_FLAG)]


def unpacked(modules: Iterable[nn.Module]) -> list[tuple[Any, str, Any]]:
    """Return replacements for ``patched`` under which one thread packs no weight."""
    by_class: dict[type, list[nn.Module]] = {}
    for module in _packing(modules):
        by_class.setdefault(type(module), []).append(module)
    return [(kind, _FLAG, OwnValue(found, False)) for kind, found in by_class.items()]


def keep_unpacked(model: nn.Module, adapted: bool) -> None:
    """Let no layer of an adapted model pack its weight; give back what they did before."""
    if adapted:
        for module in _packing(model.modules()):
            vars(module).update({_FLAG: False, _MARK: True})
    else:
        for module in model.modules():
            if vars(module).pop(_MARK, False):
                vars(module)[_FLAG] = True


def require_unpacked(model: nn.Module) -> None:
    """Raise if a layer has packed its weight already.

    Raises:
        SpliceError: naming the layer.
    """
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        state = getattr(own.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise SpliceError(
                f"{path} has packed its 4-bit weight for inference on this CPU, so no gradient "
                "passes it: the model ran in evaluation mode before. Load the base again, and "
                "splice before it runs."
            )
