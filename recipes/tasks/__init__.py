"""Tasks: the built-in ones, and what a task of your own can be written with.

The built-in tasks register through the entry points of ``pyproject.toml``, as a task in another
package does. A task derives from ``surgery.Task``, or from one of three bases:

    Classification       a class for a text or a pair of texts; write ``splits`` and ``labels``
    ImageClassification  a class for an image; write ``splits`` and ``labels``
    Generation           a text after a prompt of marked pieces; write ``splits``, ``pieces``,
                         ``stop``, ``score`` and ``source``

``splits`` usually finds its files with ``data_folder`` and ``find_file``, reads them with
``read_json`` or ``read_rows``, or downloads them with ``download`` or ``read_hub``. ``labelled``,
``not_empty``, ``require_columns`` and ``hold_out`` check rows and draw a validation set; their
``where`` begins the error message. ``tests/recipes/tasks/test_stranger.py`` has an example of each.
"""

from surgery_recipes.tasks.classification import Classification, hold_out, labelled
from surgery_recipes.tasks.data_files import (
    data_folder,
    download,
    find_file,
    read_hub,
    read_json,
    read_rows,
    read_text,
    require_columns,
)
from surgery_recipes.tasks.generation import Generation, Piece, not_empty, token_ids
from surgery_recipes.tasks.images import ImageClassification, channels_of, with_channels

__all__ = [
    "Classification",
    "Generation",
    "ImageClassification",
    "Piece",
    "channels_of",
    "data_folder",
    "download",
    "find_file",
    "hold_out",
    "labelled",
    "not_empty",
    "read_hub",
    "read_json",
    "read_rows",
    "read_text",
    "require_columns",
    "token_ids",
    "with_channels",
]
