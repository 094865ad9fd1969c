"""Say for each site which module's call tells what tokens there are: their mask, positions, cache.

It is the trunk that the site is in. A model can lack one, as where it embeds tokens at several
places. Then it is the smallest module around the block that is called with ids, else the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from surgery.interop import arguments_with_names, is_integer_tensor, leaves, tensors_equal
from surgery.locator.call_sites import with_ancestors
from surgery.locator.run_record import Observation
from surgery.plugin import Site

_OTHER = ("mask", "position", "type", "label")  # parts of names of whole numbers that are no ids


def with_tellers(sites: Sequence[Site], model: nn.Module, observation: Observation) -> list[Site]:
    """Return sites that know the module whose call tells what their tokens are."""
    trunks = {site.path: site.ids for site in sites if site.kind == "trunk"}
    blocks = {site.path for site in sites if site.kind == "block"}
    hosts = [site.host for site in sites if site.kind == "embedding"]
    given = [x for host in hosts if host for x in leaves((host.args, host.kwargs))]
    ids = [x for x in given if is_integer_tensor(x)]
    known: dict[str, str] = {}

    def ids_of(path: str) -> str:
        """Return the argument of a module's call that holds token ids; empty if none does."""
        if path not in known:
            call = observation.calls[path]
            named = arguments_with_names(
                type(model.get_submodule(path)).forward, call.args, call.kwargs
            )
            rows = {n: x for n, x in named.items() if is_integer_tensor(x) and x.dim() == 2}
            whole = {n: x for n, x in rows.items() if not any(part in n for part in _OTHER)}
            same = [n for n, x in whole.items() if any(tensors_equal(x, each) for each in ids)]
            known[path] = next(iter([*same, *whole]), "")
        return known[path]

    def teller(site: Site) -> tuple[str, str]:
        above = with_ancestors(site.path)
        trunk = next((path for path in above if path in trunks), None)
        if trunk is not None:
            return trunk, trunks[trunk]
        inside = max((n for n, path in enumerate(above) if path in blocks), default=-1)
        called = [path for path in above[inside + 1 :] if path in observation.calls]
        found = next((path for path in called if ids_of(path)), "")
        return found, ids_of(found) if found in observation.calls else ""

    return [dataclasses.replace(site, teller=teller(site)) for site in sites]
