"""Read Python's code: the globals that a function names, and whose code it is."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import sysconfig
import types
from pathlib import Path

import numpy
import torch

_LIBRARIES = {"torch", "numpy", "surgery"} | set(sys.stdlib_module_names) | {"builtins"}
_CLOSE = {"type", "id", "is_", "is_not", "suppress"}
_PYTHON = sysconfig.get_path("stdlib").replace("\\", "/") + "/"
_FOLDERS = tuple(
    str(Path(file).parents[up]).replace("\\", "/") + "/"
    for file, up in ((torch.__file__, 0), (numpy.__file__, 0), (__file__, 1))
)


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Return the look-ups of globals in a function: ``F.softmax(x)`` gives ``("F", "softmax")``."""
    chains: dict[tuple[str, ...], None] = {}
    chain: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if chain:
                chains[chain] = None
            chain = (instruction.argval,)
        elif chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, instruction.argval)
        elif chain and instruction.opname not in ("PUSH_NULL", "CACHE"):
            chains[chain] = None
            chain = ()
    return tuple(chains)


@functools.lru_cache(maxsize=4096)
def looks_closely(code: types.CodeType) -> bool:
    """Whether a function may tell a proxy from its value without asking the proxy.

    It asks for the exact type or the identity, or handles an exception that C code raises.
    """
    if any(not _CLOSE.isdisjoint(chain) for chain in global_names(code)):
        return True
    instructions = list(dis.get_instructions(code))
    for one, two in itertools.pairwise(instructions):
        singleton = one.opname == "LOAD_CONST" and (one.argval is None or type(one.argval) is bool)
        handler = one.opname == "PUSH_EXC_INFO" and two.opname != "WITH_EXCEPT_START"
        if handler or one.opname == "SETUP_FINALLY" or (two.opname == "IS_OP" and not singleton):
            return True
    return False


@functools.lru_cache(maxsize=4096)
def of_a_library(filename: str) -> bool:
    """Whether a file belongs to torch, numpy, this library or Python itself, or is generated."""
    name = filename.replace("\\", "/")
    if name.startswith(_PYTHON) and "/site-packages/" not in name and "/dist-packages/" not in name:
        return True
    return name.startswith((*_FOLDERS, "<frozen", "<surgery"))


def is_watched(kind: type) -> bool:
    """Whether this class is written in Python and is not of torch or of Python's own library.

    Such a class is allocated on the heap (flag 9) and not immutable (flag 8).
    """
    written_in_python = kind.__flags__ & (1 << 9) and not kind.__flags__ & (1 << 8)
    library = str(getattr(kind, "__module__", "")).partition(".")[0]
    return bool(written_in_python) and library not in _LIBRARIES
