"""Look at a whole model: its sites with their graphs and code, as a page, a drawing, a diff.

model ──(methods: spliced in for the look)──► survey ──► Anatomy ──► page, svg, diff
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.drawing.page import Facts, page
from surgery.drawing.survey import Layer, every_place, place_of, survey
from surgery.drawing.svg import svg
from surgery.drawing.unified import unified
from surgery.errors import SpliceError, StoreError
from surgery.interop import outside_inference_mode
from surgery.plugin import Method
from surgery.splicer import remove, reports, splice, spliced_model, unused_name


class Anatomy:
    """The sites of a model with their graphs and code, as they were when it was looked at.

    In a notebook it shows the page that :meth:`save` writes.

    Example:
        ``surgery.anatomy(model).save("model.html")``
    """

    def __init__(self, facts: Facts, layers: list[Layer]) -> None:
        self._facts, self._layers = facts, layers

    def __repr__(self) -> str:
        places = [*every_place(self._layers)]
        number = sum(len(place.sites) for place in places)
        edited = sum(place.edited for place in places)
        return f"Anatomy of {self._facts.model}: {number} sites, {edited} hosts edited"

    def html(self) -> str:
        """Return the page: one file that needs no network."""
        return page(self._facts, self._layers)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path.

        Raises:
            StoreError: the folder does not exist.
        """
        return _written(path, self.html())

    def svg(self, site: str, before: bool = False) -> str:
        """Return the graph of one site's host as SVG, for a paper.

        Args:
            site: the path of the site.
            before: whether to draw the base, without what is spliced in.

        Raises:
            SiteError: no site with a graph is there; the message suggests one.
        """
        graphs = place_of(self._layers, site).graphs
        assert graphs is not None
        shown = graphs.before if before or graphs.after is None else graphs.after
        return svg(shown, f"graph of {site}", alone=True)

    def diff(self, site: str | None = None) -> str:
        """Return how the code changes with what is spliced in; ``print`` it.

        Args:
            site: the path of one site; by default every host that is edited.

        Raises:
            SiteError: no site with a graph is there; the message suggests one.
            SpliceError: nothing is spliced into the model.
        """
        if not any(place.edited for place in every_place(self._layers)):
            raise SpliceError(
                f"nothing is spliced into this {self._facts.model}, so no code has changed. Splice "
                "a method into it, or pass one: methods='lora'."
            )
        one = None if site is None else place_of(self._layers, site)
        return unified(every_place(self._layers) if one is None else [one])

    def _repr_html_(self) -> str:
        frame = "width:100%;height:640px;border:1px solid #8886;border-radius:6px"
        name = escape(f"anatomy of {self._facts.model}")
        return f'<iframe title="{name}" style="{frame}" srcdoc="{escape(self.html())}"></iframe>'


@outside_inference_mode
def anatomy(
    model: nn.Module,
    methods: Method | str | Sequence[Method | str] | None = None,
    example_inputs: Any = None,
) -> Anatomy:
    """Look at the sites of a model: their graphs, their ports, and the code that runs.

    Args:
        model: any ``nn.Module``. Where something is spliced in, the graphs are shown before and
            after.
        methods: what to splice in for the look; it is taken out again, and the model is what it
            was.
        example_inputs: as for :func:`surgery.locate`.

    Raises:
        SiteError: the model has no site.
        SpliceError: the methods cannot be spliced in.

    Example:
        ``surgery.anatomy(model, "lora").save("model.html")``
    """
    whole = spliced_model(model)
    with _for_a_look(whole, methods, example_inputs):
        parameters = sum(p.numel() for p in whole.parameters())
        spliced = [repr(report).split("\n", 1)[0] for report in reports(whole).values()]
        facts = Facts(type(whole).__name__, parameters, spliced)
        return Anatomy(facts, survey(whole, example_inputs))


def diff(
    model: nn.Module,
    methods: Method | str | Sequence[Method | str] | None = None,
    site: str | None = None,
    example_inputs: Any = None,
) -> str:
    """Return the code of hosts before and after what is spliced in, as a unified diff.

    Variables have the names of ports, and each line ends with its source in the model, or with
    the edit that it belongs to. Hosts that change alike are told once.

    Args:
        model: a spliced model, or any model with ``methods``.
        methods: what to splice in for the look; it is taken out again.
        site: the path of one site; by default every host that is edited.
        example_inputs: as for :func:`surgery.locate`.

    Raises:
        SiteError: no site with a graph is there; the message suggests one.
        SpliceError: nothing is spliced into the model, and no method is given.

    Example:
        ``print(surgery.diff(model, "lora", site="transformer.h.0.attn"))``
    """
    if methods is None and not reports(spliced_model(model)):
        raise SpliceError(
            f"nothing is spliced into this {type(model).__name__}, so no code has changed. Splice "
            "a method into it, or pass one: surgery.diff(model, 'lora')."
        )
    seen: Anatomy = anatomy(model, methods, example_inputs)
    return seen.diff(site)


@contextmanager
def _for_a_look(model: nn.Module, methods: Any, example_inputs: Any) -> Iterator[None]:
    """Splice methods in for a while; no random number of the caller's is drawn."""
    if methods is None:
        yield
        return
    name = unused_name(model, "default")
    with torch.random.fork_rng(devices=[]):
        splice(model, methods, example_inputs=example_inputs, name=name)
    try:
        yield
    finally:
        remove(model, name)


def _written(path: str | Path, text: str) -> Path:
    """Write a file into a folder that exists."""
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise StoreError(f"{target}: there is no folder {target.parent}. Make it first.")
    target.write_text(text, encoding="utf-8")
    return target
