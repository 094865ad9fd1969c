"""Keep a module the object that it was while its forward runs a rewritten graph."""

from surgery.host.active_set import ALL_ON, Choice, Switches, chosen
from surgery.host.call_signature import signature
from surgery.host.divided_later import divided_in
from surgery.host.execution import apply_all, capture_host, run, run_graph
from surgery.host.foreign_forward import own_forward
from surgery.host.installation import install, subclass, uninstall
from surgery.host.operation import Operation
from surgery.host.remembered import Remembered
from surgery.host.state import HostState, hosts, is_host, state_of
from surgery.host.variant import FlippedTooLate, GuardFlipped, Variant

__all__ = [
    "ALL_ON",
    "Choice",
    "FlippedTooLate",
    "GuardFlipped",
    "HostState",
    "Operation",
    "Remembered",
    "Switches",
    "Variant",
    "apply_all",
    "capture_host",
    "chosen",
    "divided_in",
    "hosts",
    "install",
    "is_host",
    "own_forward",
    "run",
    "run_graph",
    "signature",
    "state_of",
    "subclass",
    "uninstall",
]
