"""Describe each module that owns the stacked weights of a block of experts as a site.

A block of experts is an FFN site too, whose input and output a method can edit. This site is the
module inside it whose products a method can change, expert by expert.
"""

from __future__ import annotations

from torch import nn

from surgery.locator.run_record import Observation
from surgery.plugin import HostPlan, Port, Site


def experts_sites(model: nn.Module, observation: Observation) -> list[Site]:
    """Return the sites of all modules with stacks of weights whose use is known."""
    found = []
    for path, stacks in observation.stacks.items():
        ports: dict[str, Port] = {}
        for name, use in stacks.items():
            stack = model.get_parameter(name)
            inner, outer = stack.shape[1:] if not use.transposed else stack.shape[:0:-1]
            ports[use.port] = Port(
                use.port, outer, inner, name, transposed=use.transposed, stacked=True
            )
        if ports and path:
            call = observation.calls[path]
            plan = HostPlan(path, frozenset(), call.args, call.kwargs)
            width = ports["output"].width
            found.append(Site(path, "", "experts", width, ports, dtype=stack.dtype,
                              device=stack.device, host=plan))  # fmt: skip
    return found
