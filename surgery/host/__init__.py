"""Keep a module the object that it was while its forward runs a rewritten graph."""

from surgery.host.call_signature import signature
from surgery.host.execution import capture_host, run, run_graph
from surgery.host.foreign_forward import own_forward
from surgery.host.installation import install, uninstall
from surgery.host.off_switches import switched_off
from surgery.host.state import HostState, Operation, hosts, is_host, state_of
from surgery.host.variant import FlippedTooLate, GuardFlipped, Variant

__all__ = [
    "FlippedTooLate",
    "GuardFlipped",
    "HostState",
    "Operation",
    "Variant",
    "capture_host",
    "hosts",
    "install",
    "is_host",
    "own_forward",
    "run",
    "run_graph",
    "signature",
    "state_of",
    "switched_off",
    "uninstall",
]
