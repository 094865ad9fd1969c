"""Write a package with a new method, from the templates in ``surgery/cli/templates``.

    lora     low-rank updates of projections, which merge
    prefix   virtual keys and values behind a gate
    ffn      a bottleneck beside each FFN
    edit     a change of the output of each FFN

A template is the file itself, with METHOD for the method's name and CLASS for its class.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import surgery
from surgery.errors import MethodError, StoreError

TEMPLATES = Path(__file__).parent / "templates"


class Kind(str, Enum):
    """What a new method can start from."""

    lora = "lora"
    prefix = "prefix"
    ffn = "ffn"
    edit = "edit"


def write_package(name: str, like: Kind = Kind.edit, folder: Path | None = None) -> Path:
    """Write a package for a new method and return its folder.

    Args:
        name: the name of the method.
        like: what the method starts from.
        folder: where to write it; ``surgery-NAME`` in the current folder by default.

    Raises:
        MethodError: the name is no identifier in small letters, makes no class, or a method has it
            already.
        StoreError: the folder is there already and is not empty. Nothing has been written.
    """
    if not name.isidentifier() or name != name.lower():
        raise MethodError(
            f"{name!r} cannot be the name of a method. Use small letters, digits and underscores, "
            "such as my_method."
        )
    if name in surgery.methods():
        raise MethodError(f"there is a method {name!r} already. Choose another name.")
    folder = Path(f"surgery-{name.replace('_', '-')}") if folder is None else folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is there already, and not an empty folder. Name another one.")
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "check.yml": ".github/workflows/check.yml",
        "test_method.py.txt": f"test_{name}.py",
        f"{like.value}.py.txt": f"surgery_{name}.py",
    }
    made = "".join(part.title() for part in name.split("_"))
    taken = re.findall(r"\b[A-Z]\w*", (TEMPLATES / f"{like.value}.py.txt").read_text())
    if not made.isidentifier() or made in {*taken, "Any", "None", "True", "False"} - {"CLASS"}:
        raise MethodError(
            f"{name!r} cannot be the name of a method: its class would be {made or 'nameless'}, "
            "which the file cannot have. Choose another name."
        )
    words = {"METHOD": name, "CLASS": made}
    for template, target in files.items():
        text = (TEMPLATES / template).read_text()
        for word, meaning in words.items():
            text = text.replace(word, meaning)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(text)
    return folder
