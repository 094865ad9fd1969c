"""Read a YAML text as plain data of bounded size, and write plain data as YAML.

Plain data are mappings with texts as keys, lists, texts, numbers, truth values and null. A text may
come from anybody, so what it may cost is bounded before anything is built of it: its length, its
depth, and its size once each alias is replaced by what it repeats. Values follow YAML 1.2: ``1e-3``
is a number, ``no`` and ``2026-01-31`` are texts. PyYAML alone follows YAML 1.1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from surgery import RecipeError
from surgery_recipes.recipe_files.shown_values import reason, short, shown
from surgery_recipes.recipe_files.whole_files import write_whole

MAX_BYTES = 2**18  # of a file
MAX_SIZE = 2**16  # characters and values, with all aliases written out
MAX_DEPTH = 32
MAX_BITS = 64  # of a whole number
WHAT_PYTHON_RAISES = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class _TooMuch(yaml.YAMLError):
    """A text that would cost too much, or holds something that is not plain data."""


class _Loader(yaml.SafeLoader):
    """Counts what a text costs while its nodes are composed, before any value is made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.size = 0
        self.size_of: dict[str, int] = {}  # by anchor, once its node is complete

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; an alias costs what the node costs that it repeats."""
        event, before = self.peek_event(), self.size
        alias = isinstance(event, yaml.AliasEvent)
        if alias and event.anchor in self.anchors and event.anchor not in self.size_of:
            raise _TooMuch(f"{_place(event.start_mark)}*{short(event.anchor)} repeats itself")
        known = self.size_of.get(event.anchor, 0) if alias else 0
        self.size += known if alias else 1 + len(getattr(event, "value", ""))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooMuch(f"{_place(event.start_mark)}more than {MAX_DEPTH} levels")
        if self.size > MAX_SIZE:
            raise _TooMuch(
                f"{_place(event.start_mark)}more than {MAX_SIZE:,} characters and values, counting "
                "what aliases repeat"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor and not alias:
            self.size_of[event.anchor] = self.size - before
        return node


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that :class:`_Loader` would read as something else."""


_SCIENTIFIC = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_OTHER_IN_1_2 = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _OTHER_IN_1_2]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789."))


def read_yaml(file: Path) -> Any:
    """The plain data of a YAML file.

    Raises:
        RecipeError: it is not a regular file, cannot be read, is too large, or is not plain data.
    """
    try:
        if not file.is_file():
            raise RecipeError(f"{file}: this is a folder or a device, not a YAML file.")
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{short(str(file))}: cannot be read: {reason(error)}.") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file}: more than {MAX_BYTES:,} bytes are too many for a recipe.")
    try:
        return _parsed(data.decode())
    except (yaml.YAMLError, *WHAT_PYTHON_RAISES) as error:
        raise RecipeError(f"{file}: this is not YAML for a recipe: {_why(error)}.") from error


def parse_value(text: str) -> Any:
    """The plain data of a YAML text.

    Raises:
        RecipeError: the text is too large, or is not plain data.
    """
    try:
        return _parsed(text)
    except (yaml.YAMLError, *WHAT_PYTHON_RAISES) as error:
        raise RecipeError(f"{shown(text)} is not YAML for a recipe: {_why(error)}.") from error


def write_yaml(content: Any, file: Path) -> None:
    """Write plain data, to be read by :func:`read_yaml`."""
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_whole(file, text)


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file; no path that the system refuses does."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        return _plain(loader.get_single_data())
    finally:
        loader.dispose()


def _plain(value: Any) -> Any:
    """A copy in which nothing is shared, so that a change of one part leaves the others alone."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise _TooMuch(f"the key {shown(key)} is not a text. Put it in quotes")
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str) and yaml.reader.Reader.NON_PRINTABLE.search(value):
        raise _TooMuch(f"{shown(value)} has a control character")
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise _TooMuch(f"a whole number of more than {MAX_BITS} bits")
    if value is not None and not isinstance(value, (str, int, float)):
        raise _TooMuch(
            f"{shown(value)} is not a text, a number, a truth value, a list or a mapping. "
            "Put it in quotes"
        )
    return value


def _why(error: Exception) -> str:
    """What is wrong with a text, and where."""
    if isinstance(error, yaml.MarkedYAMLError):
        said = ", ".join(filter(None, (error.context, error.problem)))
        return f"{_place(error.problem_mark or error.context_mark)}{short(said)}"
    return short(reason(error))


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
