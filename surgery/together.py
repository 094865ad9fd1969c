"""Together: verify methods whose modules work only all together, in one run of the trunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from surgery.errors import SpliceError
from surgery.host import original_class
from surgery.quiet import hookless
from surgery.report import Report
from surgery.sites import Site
from surgery.values import detached_copy
from surgery.verify import difference, gradients


def verify_together(model: nn.Module, report: Report, others: list[Site]) -> None:
    """Raise unless a gradient reaches every parameter of what works only together."""
    paths = [i.path for i in report.inserted if i.method.together]
    trunk = next((site for site in others if site.kind == "trunk"), None)
    if not paths or trunk is None or trunk.host is None:
        return
    module, given = model.get_submodule(trunk.path), (trunk.host.args, trunk.host.kwargs)
    named = [(f"{p}.{n}", x) for p in paths for n, x in model.get_submodule(p).named_parameters()]
    if not named or named[0][1].is_meta:
        return
    parameters = [parameter for _, parameter in named]
    with hookless(module):
        base = _plain(module, partial(original_class(module).forward, module), given)
        now = _plain(module, module.forward, given)
        report.change[trunk.path] = difference(base, now)
        found = gradients(module.forward, parameters, given)
    for (name, _), gradient in zip(named, found or [None] * len(named), strict=True):
        if gradient is None or not bool((gradient != 0).any()):
            raise SpliceError(
                f"{name}: it cannot change what {trunk.path or 'the model'} gives, wherever its "
                "parameters stand. Choose other sites with at=."
            )


def _plain(module: nn.Module, forward: Callable[..., Any], given: Any) -> Any:
    with torch.no_grad():
        args, kwargs = detached_copy(given)
        return forward(*args, **kwargs)
