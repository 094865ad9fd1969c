"""Choose among the sites of a model; each choice is a selection again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, overload

from surgery.errors import SiteError
from surgery.plugin.site import Site


class Sites:
    """The sites of a model, in the order of its computation. Selections are Sites again.

    Iteration and length cover attention and FFN. ``others`` holds the sites of the other kinds; a
    method that names such a kind in ``kinds`` is offered those that the selection still holds.
    ``overlooked`` names what no site reaches: projections of hosts that make no port, and modules
    that the example did not run.

    Example:
        ``surgery.locate(model).attention.layers(0, 12).expect(12)``
    """

    def __init__(
        self,
        sites: list[Site],
        model: str = "",
        others: list[Site] | None = None,
        overlooked: list[str] | None = None,
    ) -> None:
        self._sites, self._model, self.others = list(sites), model, list(others or ())
        self.overlooked = list(overlooked or ())

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> Sites: ...

    def __getitem__(self, index: int | slice) -> Site | Sites:
        chosen = self._sites[index]
        if isinstance(chosen, list):
            return Sites(chosen, self._model, overlooked=self.overlooked)
        return chosen

    @property
    def attention(self) -> Sites:
        """The attention sites."""
        return self.where(lambda site: site.kind == "attention")

    @property
    def ffn(self) -> Sites:
        """The feed-forward sites."""
        return self.where(lambda site: site.kind == "ffn")

    @property
    def linear(self) -> Sites:
        """Projections outside attention and FFN (a state space's, a head); not iterated over."""
        return self._other("linear")

    @property
    def norm(self) -> Sites:
        """Norms with a weight or a bias; not iterated over."""
        return self._other("norm")

    @property
    def position(self) -> Sites:
        """Modules that encode the positions of tokens; not iterated over."""
        return self._other("position")

    def _other(self, kind: str) -> Sites:
        chosen = [site for site in self.others if site.kind == kind]
        return Sites(chosen, self._model, overlooked=self.overlooked)

    def layers(self, start: int, stop: int) -> Sites:
        """Return the sites whose layer number is in ``range(start, stop)``."""
        return self.where(lambda site: site.layer is not None and start <= site.layer < stop)

    def matching(self, regex: str) -> Sites:
        """Return the sites with a match of ``regex`` somewhere in their path."""
        return self.where(lambda site: re.search(regex, site.path) is not None)

    def where(self, keep: Any) -> Sites:
        """Return the sites for which ``keep(site)`` is true."""
        others = [site for site in self.others if keep(site)]
        return Sites([site for site in self if keep(site)], self._model, others, self.overlooked)

    def expect(self, n: int) -> Sites:
        """Return these sites if there are ``n`` of them.

        Raises:
            SiteError: there are more or fewer; the message lists them.
        """
        if len(self) != n:
            raise SiteError(f"expected {n} sites in {self._model}, found {len(self)}:\n{self}")
        return self

    def __add__(self, other: Sites) -> Sites:
        sites = {s.identity: s for s in [*self, *other]}
        others = {s.identity: s for s in [*self.others, *other.others]}
        lines = [*dict.fromkeys([*self.overlooked, *other.overlooked])]
        return Sites([*sites.values()], self._model, [*others.values()], lines)

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("site", "what", "heads", "kv", "d", "width", "ports")]
        for s in self:
            numbers = (s.heads, s.kv_heads, s.head_width) if s.kind == "attention" else ("", "", "")
            ports = " ".join(s.ports)
            rows.append(
                (s.path or "(root)", s.description, *map(str, numbers), str(s.width), ports)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[6]])
            for row in rows
        ]
        count = f"{len(self.attention)} attention, {len(self.ffn)} FFN"
        counts = {name: len(self._other(name)) for name in ("linear", "norm")}
        more = [f"{number} {name}" for name, number in counts.items() if number]
        count += f" (and {', '.join(more)})" if more else ""
        head = f"{len(self)} sites in {self._model}: {count}"
        return "\n".join([head, *lines, *overlooked_lines(self.overlooked)])


def overlooked_lines(overlooked: list[str], limit: int = 5) -> list[str]:
    """Return the lines that show what no site reaches, the first ``limit`` of them."""
    if not overlooked:
        return []
    rest = len(overlooked) - limit
    more = [f"  and {rest} more, see .overlooked"] if rest > 0 else []
    return ["no site reaches:", *(f"  {line}" for line in overlooked[:limit]), *more]
