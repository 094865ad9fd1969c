"""Build what a splice would insert, without memory, values or a change of the model.

Options that come from a file may ask for any amount of memory. On the meta device a module costs
nothing, and has the names and shapes that it would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from surgery.plugin import CALLS, Edit, Method, Sites
from surgery.splicer.assignment import assign
from surgery.splicer.record import Report
from surgery.splicer.transaction import Transaction


def rehearse(
    model: nn.Module, methods: Sequence[Method], sites: Sites
) -> Iterator[tuple[str, Edit, nn.Module]]:
    """Yield the modules that ``splice(model, methods, at=sites)`` would insert, in its order.

    Each comes with the path of its site and its edit, on the meta device. Whatever a method raises
    is passed on.
    """
    for method in methods:
        method.check_declared()
    todo = assign(model, tuple(methods), sites)
    transaction = Transaction(model, Report("", tuple(methods)), todo, trunk=False)
    meta = torch.device("meta")
    for path, pairs in todo.items():
        for method, site in sorted(pairs, key=lambda pair: pair[1].kind in CALLS):  # stable
            here = dataclasses.replace(site, device=meta)
            with meta:
                now = transaction.opened(method, here)
                method.splice(now)
            for edit, module in now.edits:
                yield path, edit, module
