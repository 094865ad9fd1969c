"""What a watch has seen: tensors by site and port, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from surgery.errors import PortError, suggest
from surgery.plugin import Site


class EnoughSeen(Exception):
    """Ends a forward of which everything wanted has been read; :meth:`Seen.stop` catches it."""

    def __init__(self, seen: Seen) -> None:
        super().__init__("a block of Seen.stop() ends here")
        self.seen = seen


class Values:
    """Tensors by site and port: ``values[site, "output"]``; a path serves in place of a site.

    Iteration yields the pairs of site and port that have a tensor, in the order of the sites.
    """

    def __init__(self, wanted: list[tuple[Site, str]], absent: str) -> None:
        self._wanted = {(site.identity, port): (site, port) for site, port in wanted}
        self._absent = absent
        self._values: dict[Any, Tensor] = {}

    def __getitem__(self, key: tuple[Site | str, str]) -> Tensor:
        found = self._find(*key)
        if found not in self._values:
            site, port = self._wanted[found]
            raise PortError(f"port {port!r} of {site.path or 'the model'}: {self._absent}")
        return self._values[found]

    def __contains__(self, key: tuple[Site | str, str]) -> bool:
        return self._find(*key) in self._values

    def __iter__(self) -> Iterator[tuple[Site, str]]:
        return (pair for key, pair in self._wanted.items() if key in self._values)

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[tuple[Site, str], Tensor]]:
        """Yield each pair of site and port with its tensor."""
        return ((pair, self._values[pair[0].identity, pair[1]]) for pair in self)

    def _find(self, place: Site | str, port: str) -> Any:
        """Return the key of a site, or of the one site at a path.

        Raises:
            PortError: this place is not watched, or several sites are at the path.
        """
        if isinstance(place, Site):
            found = [(place.identity, port)] if (place.identity, port) in self._wanted else []
        else:
            found = [k for k, (s, p) in self._wanted.items() if (s.path, p) == (place, port)]
        if len(found) == 1:
            return found[0]
        path = place.path if isinstance(place, Site) else place
        if found:
            raise PortError(
                f"{len(found)} sites at {path!r} have the port {port!r}. Give the site itself in "
                "place of its path."
            )
        known = list(dict.fromkeys(f"{s.path}, {p}" for s, p in self._wanted.values()))
        raise PortError(
            f"port {port!r} of {path!r} is not watched. {suggest(f'{path}, {port}', known)}Watched "
            f"here: {'; '.join(known[:5])}{'; ...' if len(known) > 5 else ''}."
        )

    def _put(self, key: Any, value: Tensor) -> None:
        self._values[key] = value

    def __repr__(self) -> str:
        lines = [f"  {s.path}, {p}: {tuple(x.shape)} {x.dtype}" for (s, p), x in self.items()]
        return "\n".join(
            [f"{len(self)} of {len(self._wanted)} watched ports have a tensor", *lines]
        )


class Seen(Values):
    """What :func:`surgery.watch` yields: the value of each watched port in the last forward.

    Where a module runs several times in one forward, its last run counts. ``seen[site, "output"]``
    is detached and the watch's own; with ``gradients=True`` it is the tensor of the forward itself.

    Attributes:
        gradients: the gradients of the last backward pass, by site and port, likewise.

    Example:
        ``with surgery.watch(model, "lse") as seen: model(**inputs)``, then ``seen[site, "lse"]``
    """

    def __init__(self, wanted: list[tuple[Site, str]]) -> None:
        super().__init__(
            wanted,
            "no forward has run it yet, in the thread that opened the watch. Run the model inside "
            "the block, in that thread; a call of stop() may have ended the forward before it.",
        )
        self.gradients = Values(
            wanted,
            "no gradient has reached it. Pass gradients=True to surgery.watch, run the forward "
            "with gradients enabled, and call backward() on a result that depends on it.",
        )
        self._left: set[Any] | None = None

    @contextmanager
    def stop(self) -> Iterator[None]:
        """End the block as soon as every watched port has been read in it.

        The forward stops there: later modules don't run, and what follows the call inside the
        block doesn't run either. If some port is never read, the block runs to its end.

        Example:
            ``with seen.stop(): model(**inputs)``
        """
        before = self._left
        self._left = set(self._wanted)
        try:
            yield
        except EnoughSeen as enough:
            if enough.seen is not self:
                raise
        finally:
            self._left = before

    def _put(self, key: Any, value: Tensor) -> None:
        super()._put(key, value)
        if self._left is not None:
            self._left.discard(key)
            if not self._left:
                raise EnoughSeen(self)
