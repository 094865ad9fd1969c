"""Watch ports while a model runs, inside a ``with`` block.

    watch -> splice recorders -> the user's forwards -> remove

The recorders are a splice named ``watch``. It is on whatever ``using``, ``use``, ``disabled`` and
``route`` choose, and records what the thread runs that opened the block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.direct.port_edit import PortEdit, apply, chosen_sites
from surgery.direct.seen_values import Seen
from surgery.errors import PortError, suggest
from surgery.interop import in_backward
from surgery.locator import locate
from surgery.plugin import Site, Sites
from surgery.splicer import look_up, remove, reports, spliced_model, unused_name


@contextmanager
def watch(
    model: nn.Module,
    ports: str | Sequence[str],
    at: Sites | Site | Sequence[Site] | None = None,
    gradients: bool = False,
    example_inputs: Any = None,
) -> Iterator[Seen]:
    """Record the values of ports inside a ``with`` block.

        with surgery.watch(model, "weights") as seen:
            model(**inputs)
        seen[site, "weights"]                          # (B, H, n, m)

    Outputs keep their bits. The block's end takes the recorders out, whatever happens inside.
    Splices that are switched off stay off, and the watch stays on.

    Args:
        model: any model, spliced or not; ports have the values that its splices give them.
        ports: the name of a port, or several. At the ``"call"`` of a block, and at the
            ``"output"`` of one that ``at`` names, it is the hidden states that the block returns.
        at: the sites; by default every attention and FFN, and every block for ``"call"``. A site
            that lacks a port is left out.
        gradients: keep the graph and the gradients: ``seen[...]`` is the tensor of the forward
            itself, and ``seen.gradients[...]`` its gradient after ``backward()``, also where
            every parameter is frozen. By default values are detached copies.
        example_inputs: as for :func:`surgery.locate`; not needed if ``at`` is given.

    Yields:
        a :class:`surgery.Seen`. It has the last value of each port, and stays when the block ends;
        ``surgery.read`` collects every value. ``with seen.stop():`` ends a forward early.

    Raises:
        PortError: no site has a port.
        SurgeryError: as ``locate`` and ``splice`` do. Nothing has changed.

    Example:
        ``with surgery.watch(model, "lse") as seen: model(**inputs)``, then ``seen[site, "lse"]``
    """
    names = (ports,) if isinstance(ports, str) else tuple(ports)
    if at is None:
        located = locate(model, example_inputs)
        sites = [*located, *(located.block if "call" in names else ())]
    else:
        sites = chosen_sites(at)
    wanted = [(site, port) for site in sites for port in names if port in site.ports]
    if at is None:
        wanted = [(site, port) for site, port in wanted if site.kind != "block" or port == "call"]
    _require_ports(names, sites, wanted)
    seen = Seen(wanted)
    owner = threading.get_ident()
    what = {(s.identity, p): _Recorder(seen, (s.identity, p), owner, gradients) for s, p in wanted}
    whole = spliced_model(model)
    name = unused_name(whole, "watch")
    chosen = list({site.identity: site for site, _ in wanted}.values())
    apply(whole, chosen, PortEdit("watch", what), name)
    switches = look_up(whole).switches
    switches.always |= {name}
    try:
        yield seen
    finally:
        switches.always -= {name}
        if name in reports(whole):  # remove(model) inside the block has taken it out already
            remove(whole, name)


class _Recorder:
    """Record a value, and return it."""

    def __init__(self, seen: Seen, key: Any, owner: int, gradients: bool) -> None:
        self.seen, self.key, self.owner, self.gradients = seen, key, owner, gradients

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, value: Tensor) -> Tensor:
        if threading.get_ident() != self.owner or in_backward():
            return value
        if not self.gradients:
            self.seen._put(self.key, value.detach().clone())
            return value
        if torch.is_grad_enabled() and value.is_floating_point():
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            value.register_hook(self._keep_gradient)  # type: ignore[no-untyped-call]
        self.seen._put(self.key, value)
        return value

    def _keep_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # the result does not depend on it
            self.seen.gradients._put(self.key, gradient.detach())


def _require_ports(
    names: tuple[str, ...], sites: list[Site], wanted: list[tuple[Site, str]]
) -> None:
    """Raise unless each port is at one of the sites."""
    found = {port for _, port in wanted}
    known = list(dict.fromkeys(port for site in sites for port in site.ports))
    for name in names:
        if name not in found:
            why = next((s.missing[name] for s in sites if name in s.missing), "")
            raise PortError(
                f"watch: none of the {len(sites)} sites has a port {name!r}"
                f"{f' ({why})' if why else ''}. {suggest(name, known)}Ports here: "
                f"{', '.join(known)}."
            )
    if not names:
        raise PortError("watch: no port was named. Name one, such as ports='output'.")
