"""Refuse what may not be inserted at a port, before anything has changed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from surgery.errors import PortError
from surgery.plugin.edit import TOLD
from surgery.plugin.protocol_names import METHODS
from surgery.plugin.site import Port, Site

OFFERS = (*METHODS, "needs_bias", "onto")


def require_insertable(
    site: Site,
    base_parts: Mapping[int, Any],
    port: Port,
    verb: str,
    module: Any,
    name: str,
    reads: tuple[str, ...],
) -> None:
    """Raise unless ``module`` may be inserted at ``port`` of ``site`` under ``name``.

    ``base_parts`` are the modules and parameters of the base, by id.

    Raises:
        PortError: ``module`` is not an ``nn.Module``, ``name`` is not an identifier, the port
            cannot be edited with this verb, a read does not exist, the module contains a part of
            the base, or it has an attribute that is almost one of the protocols' names.
    """
    where = f"{verb} at port {port.name!r} of {site.path}"
    if not isinstance(module, nn.Module):
        raise PortError(f"{where}: {module!r} is not an nn.Module. Pass an object of one.")
    if not name.isidentifier():
        raise PortError(f"{where}: name={name!r} must be an identifier, for it names a module.")
    around = port.name == "call" or port.stacked
    if port.name == "lse" or (around and verb != "wrap"):
        only = "read" if port.name == "lse" else "wrapped"
        raise PortError(f"{where}: {port.name!r} can only be {only}. Edit another port.")
    if isinstance(reads, str):
        raise PortError(f"{where}: reads={reads!r} must be a tuple: ({reads!r},).")
    for read in reads:
        if read == "mask" and site.kind == "attention":
            continue  # None where a call has no mask
        if read in TOLD and site.kind in ("attention", "ffn", "block"):
            if not site.batch_first:
                raise PortError(
                    f"{where}: {read!r} cannot be read: the batch is not the first axis there."
                )
            continue
        name_of_port, _, part = read.partition(".")
        read_port = site.port(name_of_port)
        if part and (part not in ("source", "bias") or not (read_port.in_width or read_port.bias)):
            raise PortError(
                f"{where}: {read!r} cannot be read. A port that a projection makes has '.source' "
                f"(the projection's input) and '.bias'; {name_of_port!r} is read without a suffix."
            )
    for inner, part_of_it in (*module.named_modules(), *module.named_parameters()):
        if id(part_of_it) in base_parts:
            raise PortError(
                f"{where}: {inner or 'the module'} of what is inserted is part of the base, and "
                "would be trained and moved with it. Hold it by surgery.Reference(module), or use "
                "port.frozen() or site.frozen_norm()."
            )
    require_no_near_miss(module, where)


def require_no_near_miss(module: nn.Module, where: str) -> None:
    """Raise if a module has an attribute that looks like a misspelt name of a protocol.

    A ``fold_inputs`` would never be called, and the module would silently not merge. Names are
    compared without case, underscores and a plural s, and longer ones by similarity; private
    names and those of ``nn.Module`` are left alone.

    Raises:
        PortError: such an attribute, or a protocol's method that does not take its arguments.
    """
    for own in _public_names(module):
        if own in OFFERS:
            continue
        offer = _near(own, OFFERS)
        if offer and not hasattr(module, offer):
            raise PortError(
                f"{where}: {type(module).__name__}.{own} is never used. Did you mean {offer!r}? "
                "Rename it; surgery.plugin.module_protocols lists the names that are used."
            )
    forward = inspect.signature(type(module).forward).parameters
    for own, parameter in forward.items():
        if parameter.default is not parameter.empty and own != "onto" and _near(own, ["onto"]):
            raise PortError(
                f"{where}: {type(module).__name__}.forward has a parameter {own!r}, which is never "
                "given. Did you mean 'onto'?"
            )
    for offer, arguments in METHODS.items():
        method = getattr(module, offer, None)
        if callable(method) and arguments is not None:
            try:
                inspect.signature(method).bind(*arguments)
            except TypeError as error:
                raise PortError(
                    f"{where}: {type(module).__name__}.{offer} is called with "
                    f"{len(arguments)} arguments, and does not take them ({error}). See "
                    "surgery.plugin.module_protocols."
                ) from error


def _public_names(module: nn.Module) -> Iterable[str]:
    inherited = set(dir(nn.Module))
    names = {*dir(type(module)), *vars(module), *module._modules, *module._parameters}
    return sorted(name for name in names if name not in inherited and not name.startswith("_"))


def _near(name: str, offers: Iterable[str]) -> str:
    """Return the offer that a name almost is, or "". Short names differ in case or plural only."""
    plain = {offer: _plain(offer) for offer in offers}
    for offer, text in plain.items():
        if _plain(name) == text:
            return offer
    long = [offer for offer in plain if len(offer) > 8]
    close = difflib.get_close_matches(name, long, n=1, cutoff=0.85)
    return close[0] if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("s")
