"""Push an adapter to the Hugging Face hub: its two files, a model card, a tokenizer; no base."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter.downloading import REPOSITORY, hub_library
from surgery.adapter.inspection import inspect
from surgery.adapter.manifest import JSON, LARGEST, parse
from surgery.adapter.model_card import model_card
from surgery.adapter.saving import save
from surgery.errors import StoreError, shown
from surgery.formats import contents

_TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece.*model", "chat_template.*",
)  # fmt: skip


def push(
    model: nn.Module | str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    private: bool | None = None,
    scores: Mapping[str, float] | None = None,
    message: str = "Add an adapter made with surgery",
    token: str | bool | None = None,
) -> str:
    """Upload the adapter of a model to the Hugging Face hub, with a model card; never the base.

    Args:
        model: a spliced model, or the folder of a saved adapter.
        repository: ``OWNER/NAME``, or a name of your own; it is made if needed.
        revision: the branch to commit to; the main one by default.
        subfolder: the folder in the repository; several adapters can live in one.
        private: whether a new repository is private; by default as the owner's settings say.
        scores: results of the run by name, for the card.
        message: of the commit.
        token: what may write there; by default that of ``hf auth login``.

    Tokenizer files and a README.md in a saved adapter's folder are uploaded, too.

    Returns:
        the address of the commit.

    Raises:
        SpliceError: nothing is spliced into the model.
        StoreError: the folder holds no adapter, or the hub refuses.

    Example:
        ``surgery.push(model, "user/adapter", scores={"accuracy": 0.86})``
    """
    owned = repository if "/" in repository else f"me/{repository}"
    if not REPOSITORY.fullmatch(owned) or ".." in Path(subfolder).parts:
        raise StoreError(f"{repository!r} with subfolder={subfolder!r} is no place on the hub.")
    api = hub_library("pushing an adapter").HfApi(library_name="surgery", token=token)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if isinstance(model, nn.Module):
            save(model, folder)
        else:
            _copy_adapter(Path(model), folder)
        try:
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            if not (folder / "README.md").exists():
                card = model_card(inspect(folder), repository, subfolder, scores or {})
                (folder / "README.md").write_text(card, encoding="utf-8")
            done: Any = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=subfolder or None,
                revision=revision,
                commit_message=message,
                delete_patterns=["surgery-*.safetensors"],  # of the adapter that was there
            )
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(
                f"the adapter cannot be pushed to {repository} ({shown(error)}). Log in with "
                "`hf auth login`, with a token that may write there."
            ) from error
    return str(done.commit_url)


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy what is pushed of a saved adapter's folder: no weights but the adapter's own."""
    text = contents(source / JSON, LARGEST)
    if text is None:
        raise StoreError(f"{source}: no {JSON} here, so surgery.save has saved no adapter there.")
    named = [JSON, parse(text, source / JSON)["tensors"], "README.md"]
    files = [source / name for name in named if (source / name).is_file()]
    for file in [*files, *(f for pattern in _TOKENIZER for f in source.glob(pattern))]:
        shutil.copyfile(file, target / file.name)
