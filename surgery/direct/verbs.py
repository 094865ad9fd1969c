"""Insert, replace and read at ports: one line for what needs no method.

    insert     y := what(y)             an ablation, a steering vector, an adapter of one's own
    replace    y := what(*reads)        a patch, another FFN
    read       what(y), y stays         a probe

Each is one splice. It is all or nothing, and ``remove`` gives back the bits of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.direct.port_edit import Changer, PortEdit, apply, chosen_sites, one_for_each
from surgery.plugin import Site, Sites
from surgery.splicer import Report, spliced_model, unused_name

At = Sites | Site | Sequence[Site]


def insert(
    model: nn.Module,
    sites: At,
    port: str,
    what: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    name: str | None = None,
) -> Report:
    """Put a module or a function behind a port: ``y := what(y)``.

    Args:
        model: any model; see :func:`surgery.splice`.
        sites: one site, or several.
        port: the name of the port, such as ``"output"``; see :class:`surgery.Site` for shapes. At
            the ``"output"`` or the ``"call"`` of a block, y is the hidden states that it returns.
        what: a module or a function, from y to a tensor of y's shape; or a list with one for each
            site. One module for several sites has one set of parameters. A module gets the device
            of the site, and its dtype, but float32 in place of half precision; it is tried here
            with the example of the site. A function first runs in the next forward.
        name: the name of the splice; by default ``insert``, with a number if that is taken.

    Returns:
        the report of the splice. ``surgery.remove(model, report.name)`` undoes it to the bits.

    Raises:
        PortError: a site lacks the port, or it can only be read.
        SpliceError: the name is taken, or a module fails or returns another shape.
        ForwardError: by a forward, if a function returns another shape.

    Example:
        ``surgery.insert(model, sites.ffn[1], "output", lambda h: h + 4 * direction)``
    """
    return _edit("insert", model, sites, port, what, name)


def replace(
    model: nn.Module,
    sites: At,
    port: str,
    what: Changer | Sequence[Changer],
    reads: Sequence[str] | None = None,
    name: str | None = None,
) -> Report:
    """Let a module, a function or a tensor make a port: ``y := what(*reads)``.

    Args:
        model, sites, port, name: as for :func:`surgery.insert`.
        what: a module or a function of what is read, that returns a tensor of y's shape; a tensor
            that broadcasts to y; or a list with one for each site. At the ``"call"`` of a block, a
            module or function is called as the block is, in place of it.
        reads: the ports that ``what`` is called with. By default what the replaced part reads: the
            site's input for ``"output"``, so a module takes the place of a whole attention or
            FFN; the projection's input for any other port. The replaced part still runs.

    Returns:
        the report of the splice. ``surgery.remove(model, report.name)`` undoes it to the bits.

    Raises:
        PortError: as for ``insert``; or no projection makes the port, and ``reads`` is missing.
        SpliceError, ForwardError: as for ``insert``.

    Example:
        ``surgery.replace(model, sites.ffn[0], "output", MyFFN(768))``
    """
    return _edit("replace", model, sites, port, what, name, reads)


def read(
    model: nn.Module,
    sites: At,
    port: str,
    what: Callable[..., Any] | Sequence[Callable[..., Any]],
    name: str | None = None,
) -> Report:
    """Call a function or a module with the value of a port, in every forward.

    The value goes on as it is; what ``what`` returns is dropped. The value belongs to the graph of
    autograd, so a probe can be trained on it. Change nothing in it in place.

    Args:
        model, sites, port, name: as for :func:`surgery.insert`; ``"lse"`` can be read, too.
        what: a function or a module of the value; or a list with one for each site. It first runs
            in the next forward, and not when gradient checkpointing repeats one.

    Returns:
        the report of the splice. ``surgery.remove(model, report.name)`` undoes it.

    Raises:
        PortError: a site lacks the port.
        SpliceError: the name is taken, or ``what`` cannot be called.

    Example:
        ``tokens = []; surgery.read(model, sites.ffn[1], "output", tokens.append)``
    """
    return _edit("read", model, sites, port, what, name)


def _edit(
    verb: str, model: nn.Module, sites: At, port: str, what: Any, name: str | None,
    reads: Sequence[str] | None = None,
) -> Report:  # fmt: skip
    """Splice one verb at one port of these sites."""
    chosen = chosen_sites(sites)
    given = one_for_each(verb, chosen, port, what)
    edit = PortEdit(verb, given, None if reads is None else tuple(reads))
    name = unused_name(spliced_model(model), verb) if name is None else name
    return apply(model, chosen, edit, name)
