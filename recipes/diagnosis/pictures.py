"""Draw a diagnosis: heat maps of attention, updates by layer, bands of scores, first losses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery_recipes.diagnosis.lengths import Bin
from surgery_recipes.diagnosis.updates import Update
from surgery_recipes.diagnosis.virtual_mass import Mass


def write(
    folder: Path,
    before: Sequence[Mass],
    after: Sequence[Mass],
    moved: Sequence[Update],
    lengths: Mapping[str, Sequence[Bin]],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    metric: str,
) -> None:
    """Write the pictures for which there is something to draw."""
    if after:
        _mass(folder / "mass.png", before, after)
    if moved:
        _updates(folder / "updates.png", moved)
    if lengths:
        _lengths(folder / "lengths.png", lengths, metric)
    if any(losses.values()):
        _losses(folder / "losses.png", losses)


def _figure(columns: int, rows: int = 1, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _mass(path: Path, before: Sequence[Mass], after: Sequence[Mass]) -> None:
    figure, axes = _figure(2, 2)
    whens = (("start", before), ("end", after))
    for line, (name, what) in zip(
        axes, (("by_head", "head"), ("by_position", "tenth of the text")), strict=True
    ):
        for place, (when, masses) in zip(line, whens, strict=True):
            wide = max(len(getattr(mass, name)) for mass in masses)
            values = [
                [*getattr(mass, name), *[float("nan")] * (wide - len(getattr(mass, name)))]
                for mass in masses
            ]
            image = place.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            place.set(xlabel=what, ylabel="layer", title=f"{when}: attention to virtual keys")
            place.set_yticks(range(0, len(masses), max(1, len(masses) // 12)))
        figure.colorbar(image, ax=list(line), label="share of the softmax")
    figure.savefig(path, dpi=120)


def _updates(path: Path, moved: Sequence[Update]) -> None:
    ranked = [u for u in moved if u.rank is not None]
    figure, axes = _figure(2 if ranked else 1)
    _by_port(axes[0][0], moved, "moved", "norm of the change of the parameters")
    if ranked:
        _by_port(axes[0][1], ranked, "rank", "effective rank of the update")
    figure.savefig(path, dpi=120)


def _by_port(place: Any, moved: Sequence[Update], name: str, label: str) -> None:
    for port, group in itertools.groupby(sorted(moved, key=lambda u: u.port), lambda u: u.port):
        values = [getattr(u, name) for u in group]
        place.plot(range(len(values)), values, marker="o", markersize=4, label=port)
    place.set(xlabel="layer, from the input on", ylabel=label)
    place.legend(fontsize=8)
    place.grid(alpha=0.3)


def _lengths(path: Path, lengths: Mapping[str, Sequence[Bin]], metric: str) -> None:
    figure, axes = _figure(1)
    place = axes[0][0]
    for name, bins in lengths.items():
        tokens = [b.tokens for b in bins]
        (drawn,) = place.plot(tokens, [b.score for b in bins], marker="o", label=name)
        low, high = [b.low for b in bins], [b.high for b in bins]
        place.fill_between(tokens, low, high, color=drawn.get_color(), alpha=0.2)
    place.set(xlabel="tokens of the input, mean of each tenth", ylabel=f"{metric}, 95 % band")
    place.legend(fontsize=8)
    place.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _losses(path: Path, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    figure, axes = _figure(1)
    place = axes[0][0]
    for name, pairs in losses.items():
        place.plot([s for s, _ in pairs], [v for _, v in pairs], marker=".", label=name)
    place.set(xlabel="step", ylabel="training loss, nats for each example or token")
    place.legend(fontsize=8)
    place.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
