"""Write the survey of a model as one page of HTML, with nothing to fetch and no script needed.

page.html, page.css, page.js, drawing.css     the frame, with style and script in it
  a layer       a heading; its places; the other sites; the layers that read the same, folded
  a place       a summary that opens: ports, then drawing and code, in two views if edited
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template

from surgery.drawing.code import changes, code
from surgery.drawing.listing import Listing
from surgery.drawing.survey import Layer, Place, every_place
from surgery.drawing.svg import style_of_drawings, svg
from surgery.plugin import Site

_WIDEST = 760  # of a drawing that has its code beside it


@dataclass
class Facts:
    """What the head of a page says of the model.

    Attributes:
        model: the name of its class.
        parameters: how many numbers it holds, those that are spliced in included.
        spliced: a line for each splice.
    """

    model: str
    parameters: int
    spliced: list[str] = field(default_factory=list)


def page(facts: Facts, layers: list[Layer]) -> str:
    """Return the page of a model."""
    places = [*every_place(layers)]
    sites = [site for place in places for site in place.sites]
    counts = [f"{sum(len(layer.alike) + 1 for layer in layers if layer.path)} layers"]
    counts += [_counted(sites, "attention", "attention sites"), _counted(sites, "ffn", "FFN sites")]
    ids = {id(place): f"p{i}" for i, place in enumerate(places)}
    return Template(_file("page.html")).substitute(
        title=escape(f"Anatomy of {facts.model}"),
        style=style_of_drawings() + _file("page.css"),
        script=_file("page.js"),
        model=escape(facts.model),
        facts=" · ".join([*counts, f"{facts.parameters:,} parameters"]),
        spliced="".join(f'<p class="spliced">{escape(line)}</p>' for line in facts.spliced),
        new='<span class="key new">spliced in</span>' if facts.spliced else "",
        layers="\n".join(_layer(layer, ids) for layer in layers),
    )


def _file(name: str) -> str:
    return files("surgery.drawing").joinpath(name).read_text(encoding="utf-8")


def _counted(sites: list[Site], kind: str, name: str) -> str:
    return f"{sum(site.kind == kind for site in sites)} {name}"


def _layer(layer: Layer, ids: dict[int, str]) -> str:
    heading = escape(layer.path) if layer.path else "outside the layers"
    parts = [f'<section class="layer"><h2>{heading}</h2>']
    parts += [_place(place, layer.path, ids) for place in layer.places]
    if layer.others:
        names = ", ".join(
            f"<code>{escape(_below(site.path, layer.path))}</code> {escape(site.description)}"
            for site in layer.others
        )
        parts.append(f'<p class="other">also {names}</p>')
    if layer.alike:
        parts.append(_alike(layer.alike))
    return "".join([*parts, "</section>"])


def _alike(layers: list[Layer]) -> str:
    """Return the list of layers that read as the one above it."""
    names = [layer.path.rpartition(".")[2] for layer in layers]
    several = f"layers {names[0]} to {names[-1]}" if len(names) > 1 else f"layer {names[0]}"
    items = "".join(
        f"<li><code>{escape(place.path)}</code> {escape(_described(place))}</li>"
        for place in every_place(layers)
    )
    return (
        f'<details class="alike"><summary>{escape(several)} '
        f"read{'' if len(names) > 1 else 's'} the same</summary><ul>{items}</ul></details>"
    )


def _below(path: str, layer: str) -> str:
    return path[len(layer) :].lstrip(".") or path or "(root)"


def _described(place: Place) -> str:
    return ", ".join(site.description for site in place.sites)


def _place(place: Place, layer: str, ids: dict[int, str]) -> str:
    """Return one host: a summary that opens to its ports, drawing and code."""
    badge = "" if not place.edited else "+ " + ", ".join(place.edits)
    columns = (
        ("path", _below(place.path, layer)),
        ("what", _described(place)),
        ("size", "; ".join(filter(None, map(_size, place.sites)))),
        ("badge", badge),
    )
    summary = "".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in columns)
    return (
        f'<details class="place"><summary>{summary}</summary>'
        f'<div class="inside" id="{ids[id(place)]}">{_ports(place)}{_graphs(place, ids)}</div>'
        "</details>"
    )


def _size(site: Site) -> str:
    if site.kind != "attention":
        return f"width {site.width}" if site.width else ""
    groups = f", {site.kv_heads} of keys" if site.kv_heads != site.heads else ""
    return f"{site.heads} heads of {site.head_width}{groups}"


def _ports(place: Place) -> str:
    """Return the list of ports of each site of a host, and of what is spliced in."""
    rows = [("path", f"<code>{escape(place.path or '(root)')}</code>")]
    for site in place.sites:
        name = "ports" if len(place.sites) == 1 else f"ports of the {site.description}"
        rows.append((name, " ".join(f"<code>{escape(port)}</code>" for port in site.ports)))
        if site.missing:
            lacks = "; ".join(f"{port}: {why}" for port, why in site.missing.items())
            rows.append(("not here", escape(lacks)))
    edits = [
        f"<code>{escape(c)}</code> {e.verb} at {escape(e.port)}" for c, e in place.edits.items()
    ]
    rows += [("spliced in", ", ".join(edits))] if edits else []
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in rows) + "</dl>"


def _graphs(place: Place, ids: dict[int, str]) -> str:
    """Return drawing and code of a host, before and after; or a link to a host that is the same."""
    if place.graphs is None:
        reason = place.problem or "Only its call is edited: its graph is as before."
        return f'<p class="problem">{escape(reason)}</p>' if place.edited or place.problem else ""
    if place.first is not place:
        first = place.first
        return f'<p>Reads as <a href="#{ids[id(first)]}">{escape(first.path)}</a>.</p>'
    before, after = place.graphs.before, place.graphs.after
    if after is None:
        pane = _pane(before, place.path, "", code(before))
        return f'<div class="pane only{_wide(pane)}">{pane}</div>'
    name = f"view-{ids[id(place)]}"
    views = (("Before", before, code(before)), ("After", after, changes(before, after)))
    radios = "".join(
        f'<input type="radio" class="v{i}" name="{name}" id="{name}-{i}"'
        f'{" checked" if i else ""}><label for="{name}-{i}">{label}</label>'
        for i, (label, _, _) in enumerate(views)
    )
    inside = [_pane(listing, place.path, f" {n.lower()}", text) for n, listing, text in views]
    panes = "".join(
        f'<div class="pane pane{i}{_wide(pane)}">{pane}</div>' for i, pane in enumerate(inside)
    )
    return f'<fieldset class="views"><legend>graph and code</legend>{radios}{panes}</fieldset>'


def _wide(pane: str) -> str:
    """Return the class of a pane whose drawing needs the whole width."""
    width = re.search(r'<svg[^>]* width="(\d+)"', pane)
    return " wide" if width is not None and int(width.group(1)) > _WIDEST else ""


def _pane(listing: Listing, path: str, when: str, text: str) -> str:
    label = escape(f"code of {path or 'the model'}{when}")
    drawing = svg(listing, f"graph of {path or 'the model'}{when}")
    return (
        f'<div class="picture">{drawing}</div>'
        f'<div class="code" role="group" aria-label="{label}">{text}</div>'
    )
