"""Choose among the sites of a model; each choice is a selection again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, overload

from surgery.errors import SiteError
from surgery.plugin.notebook import html_table
from surgery.plugin.site import Site

_COUNTED = ("linear", "convolution", "experts", "norm")


class Sites:
    """The sites of a model, in the order of its computation. Selections are Sites again.

    Iteration and length cover attention and FFN. ``others`` holds the sites of the other kinds; a
    method that names such a kind in ``kinds`` is offered those that the selection still holds.
    ``overlooked`` names what no site reaches: projections of hosts that make no port, and modules
    that the example did not run.

    Example:
        ``surgery.locate(model).attention.layers(0, 2).expect(2)``
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
    def convolution(self) -> Sites:
        """Convolutions of more than one position; not iterated over."""
        return self._other("convolution")

    @property
    def experts(self) -> Sites:
        """Modules that hold the stacked weights of all experts of a block; not iterated over."""
        return self._other("experts")

    @property
    def embedding(self) -> Sites:
        """Embeddings of the token ids; not iterated over."""
        return self._other("embedding")

    @property
    def norm(self) -> Sites:
        """Norms with a weight or a bias; not iterated over."""
        return self._other("norm")

    @property
    def block(self) -> Sites:
        """The smallest modules with one attention and one FFN; not iterated over."""
        return self._other("block")

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
        """Return what a regular expression chooses by the paths of modules.

        It is searched for in each path. A site whose own path has a match is chosen whole. Of any
        other, those projections are chosen whose modules' paths have one, and a method such as
        LoRA edits these ports, whatever its ``ports``: ``sites.matching("q_proj|v_proj")``. A
        linear site is iterated over if the match needs its own name, as in ``"lm_head"``.

        Raises:
            SiteError: it is no regular expression.
        """
        try:
            search = re.compile(regex).search
        except (re.error, TypeError) as error:
            raise SiteError(f"matching({regex!r}): no regular expression ({error}).") from error
        chosen = [_picked(site, search) for site in [*self, *self.linear]]
        others = [s for s in self.others if search(_own_path(s))]
        return Sites([s for s in chosen if s is not None], self._model, others, self.overlooked)

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
        sites: dict[tuple[str, str, str], Site] = {}
        for site in [*self, *other]:
            sites[site.identity] = _joined(sites.get(site.identity), site)
        others = {s.identity: s for s in [*self.others, *other.others]}
        lines = [*dict.fromkeys([*self.overlooked, *other.overlooked])]
        return Sites([*sites.values()], self._model, [*others.values()], lines)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the table of these sites, headings first."""
        rows: list[tuple[str, ...]] = [("site", "what", "heads", "kv", "d", "width", "ports")]
        for s in self:
            numbers = (s.heads, s.kv_heads, s.head_width) if s.kind == "attention" else ("", "", "")
            ports = " ".join(s.picked or s.ports)
            rows.append(
                (s.path or "(root)", s.description, *map(str, numbers), str(s.width), ports)
            )
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[6]])
            for row in rows
        ]
        return "\n".join([self._heading(), *lines, *overlooked_lines(self.overlooked)])

    def _repr_html_(self) -> str:
        columns, *rows = self._rows()
        return html_table(self._heading(), columns, rows, overlooked_lines(self.overlooked))

    def _heading(self) -> str:
        count = f"{len(self.attention)} attention, {len(self.ffn)} FFN"
        counts = {name: len(self._other(name)) for name in _COUNTED}
        more = [f"{number} {name}" for name, number in counts.items() if number]
        count += f" (and {', '.join(more)})" if more else ""
        return f"{len(self)} sites in {self._model}: {count}"


def _picked(site: Site, search: Callable[[str], Any]) -> Site | None:
    """Return the site whole, with those of its ports that a search finds, or None."""
    if search(_own_path(site)):
        return site if site.kind != "linear" else None
    ports = tuple(name for name, port in site.ports.items() if port.module and search(port.module))
    return dataclasses.replace(site, picked=ports) if ports else None


def _own_path(site: Site) -> str:
    """Return the path by which a whole site is chosen: of a linear layer, that of its parent."""
    return site.path.rpartition(".")[0] if site.kind == "linear" else site.path


def _joined(first: Site | None, second: Site) -> Site:
    """Return a site that is chosen twice: with the picked ports of both, or whole."""
    if first is None or not second.picked:
        return second
    both = dict.fromkeys([*first.picked, *second.picked]) if first.picked else ()
    return dataclasses.replace(second, picked=tuple(both))


def overlooked_lines(overlooked: list[str], limit: int = 5) -> list[str]:
    """Return the lines that show what no site reaches, the first ``limit`` of them."""
    if not overlooked:
        return []
    rest = len(overlooked) - limit
    more = [f"  and {rest} more, see .overlooked"] if rest > 0 else []
    return ["no site reaches:", *(f"  {line}" for line in overlooked[:limit]), *more]
