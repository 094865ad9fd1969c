"""Merged: what a merge did, and the weights that were there before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.report import Inserted


@dataclass
class Merged:
    """What ``merge`` did. Print it; as long as it is held, :meth:`undo` can put back the weights.

    Attributes:
        folded: the modules that are gone.  left: those that are still spliced.
        originals: the weights as they were, by name.
    """

    folded: list[Inserted] = field(default_factory=list)
    left: list[Inserted] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    written: dict[str, int] = field(default_factory=dict, repr=False)  # their versions since

    def undo(self, model: nn.Module) -> None:
        """Give the base its own weights back, bit for bit. (What was folded is not spliced again:
        load the adapter for that.)

        Raises:
            SpliceError: another merge, or somebody else, has written to one of them since.
        """
        own = dict(model.named_parameters())
        since = [n for n, version in self.written.items() if own[n]._version != version]
        if since:
            raise SpliceError(
                f"{since[0]} was written to after this merge. Undo later merges first, the last "
                "one before the others."
            )
        with torch.no_grad():
            for name, tensor in self.originals.items():
                own[name].copy_(tensor)

    def __repr__(self) -> str:
        text = f"folded {len(self.folded)} modules into {len(self.originals)} weights and biases"
        names = sorted({i.method.name for i in self.left})
        return text + (f"; still spliced: {', '.join(names)}" if names else "")
