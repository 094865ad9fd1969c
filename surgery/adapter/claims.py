"""Compare what a saved adapter claims with its tensors and with the base.

    require_base       kept tensors and rows are the base's, not a splice's, and fit
    require_asked      a whole embedding is replaced only where the caller says so; others are told
    require_inserted   the options make modules of just these tensors; before memory is taken
    fill               missing tensors, shapes, dtypes and values; then all are copied, or none

A file may name anything. It may write to what its own splices insert, to heads and to rows, and
to other tensors of the base as far as the caller is told or has asked.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.parameters import base_tensors, full_state, state_of_modules
from surgery.errors import RefusedError, StoreError, printable, shown
from surgery.interop import huggingface, is_of_zero, like, whole
from surgery.plugin import Method, Sites
from surgery.splicer import Before, look_up, rehearse, reports

_log = logging.getLogger("surgery")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LARGE = 2**20  # of an option: beyond it, what cannot be rehearsed is not tried


def require_base(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor], folder: Any
) -> None:
    """Raise unless kept tensors and rows are the base's own, of its shapes.

    Raises:
        StoreError: the base lacks one, or has another shape there, or a splice inserted it.
    """
    own, rows = base_tensors(model), description["rows"]
    inserted = tuple(f"{i.path}." for r in reports(model).values() for i in r.inserted)
    for name in [*description["kept"], *rows]:
        if name.startswith(inserted):
            raise StoreError(
                f"the adapter in {folder} would replace {name}, which another splice of this model "
                "has inserted. An adapter may bring parameters of the base alone; do not load it."
            )
    missing = [name for name in description["kept"] if name not in own]
    if missing:
        raise StoreError(misfit(folder, missing[0], "there", "not there"))
    for name, chosen in rows.items():
        if name not in own or max(chosen) >= len(own[name]):
            raise StoreError(
                f"the adapter in {folder} has rows {shown(chosen)} of {name}, which this model "
                "lacks. If they are new tokens, add them first: take the tokenizer that was saved "
                "with the adapter and call model.resize_token_embeddings(len(tokenizer))."
            )
    mine = {key: tensor for key, tensor in tensors.items() if not key.startswith("inserted.")}
    _require_alike(_targets(own, description), mine, folder)


def _targets(own: dict[str, Tensor], description: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the base that an adapter replaces, by their names in its file."""
    found = {f"kept.{name}": own[name] for name in description["kept"]}
    for name, chosen in description["rows"].items():
        found[f"rows.{name}"] = own[name].detach()[chosen]
    return found


def require_asked(
    model: nn.Module, description: dict[str, Any], sites: Sites, keep: Sequence[str], folder: Any
) -> None:
    """Tell which tensors of the base will be replaced; raise if an embedding is, unasked.

    Asked for is what ``keep`` names, a module or a tensor, what the model itself keeps, and what
    ``from_pretrained`` found no weights for. Matrices of blocks are told by a warning, the rest in
    the log: heads, norms, rows.

    Raises:
        StoreError: a whole embedding of tokens would be replaced.
    """
    own, record = base_tensors(model), look_up(model)
    asked = (*keep, *record.kept, *huggingface.fresh_parameters(model))
    names = [n for n in description["kept"] if not _is_in(n, asked)]
    rows = {n: r for n, r in description["rows"].items() if not _is_in(n, (*asked, *record.rows))}
    positions = {site.path for site in sites.others if site.kind == "position"}
    layers = [m for n, m in model.named_modules() if n not in positions]
    tokens = {id(m.weight) for m in layers if isinstance(m, nn.Embedding)}
    for name in [*names, *(n for n, chosen in rows.items() if len(chosen) == len(own[n]))]:
        if id(own[name]) in tokens:
            raise StoreError(
                f"the adapter in {folder} would replace the whole embedding {name} of the base, "
                f"for all splices and after remove, too. If that is meant, pass keep=[{name!r}]."
            )
    kinds = ("attention", "ffn", "block")
    blocks = [s.path for s in [*sites, *sites.others] if s.kind in kinds and s.path]
    inside = [name for name in names if _is_in(name, blocks) and own[name].dim() > 1]
    if inside:
        warnings.warn(
            f"the adapter in {folder} replaces {_listed(inside)} of the base, for all splices and "
            "after remove, too. Pass their names as keep=[...] if that is meant.",
            stacklevel=3,
        )
    told = [name for name in names if name not in inside]
    told += [f"{len(chosen)} rows of {name}" for name, chosen in rows.items()]
    if told:
        _log.warning("surgery: the adapter in %s replaces %s", folder, _listed(told))


def _is_in(name: str, places: Iterable[str]) -> bool:
    """Whether a tensor is one of these, or in one of these modules."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5])) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )


def require_inserted(
    model: nn.Module,
    methods: Sequence[Method],
    sites: Sites,
    saved: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Any,
) -> None:
    """Raise unless the saved options make modules that have just the saved tensors.

    Raises:
        StoreError: other modules, or tensors of other names, shapes or dtypes.
    """
    built: list[nn.Module] = []
    places = [path.rpartition(".")[0] for path in saved["modules"]]
    try:
        for path, _, module in rehearse(model, methods, sites):
            if places[len(built) : len(built) + 1] != [path]:
                here = f"module {len(built) + 1} at {path}"
                raise StoreError(misfit(folder, "inserted modules", shown(saved["modules"]), here))
            built.append(module)
    except RefusedError:
        raise
    except Exception as error:  # of a plugin, as one that reads values when it is made
        numbers = [x for m in methods for x in m.options().values() if isinstance(x, int)]
        if any(abs(x) > _LARGE for x in numbers):
            raise StoreError(
                f"the adapter in {folder} cannot be loaded: its options {shown(saved['methods'])} "
                f"make no modules ({type(error).__name__}: {error})."
            ) from error
        return
    if len(built) != len(places):
        here = f"{len(built)} of them"
        raise StoreError(misfit(folder, "inserted modules", f"{len(places)} of them", here))
    wanted = state_of_modules(dict(zip(saved["modules"], built, strict=True)))
    own = tuple(f"inserted.{path}." for path in saved["modules"])
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith(own)}
    _require_alike({f"inserted.{name}": t for name, t in wanted.items()}, mine, folder)


def _require_alike(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Any
) -> None:
    """Raise unless these are the wanted tensors, in shape and kind of dtype, with finite values."""
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise StoreError(
            f"the adapter in {folder} lacks the tensors {missing[:5]} and has {unexpected[:5]}, "
            "which have no place in this model. See 'splices' in surgery.json for the methods and "
            "options that it was made with."
        )
    for key, target in wanted.items():
        saved = tensors[key]
        if target.shape != saved.shape:
            raise StoreError(misfit(folder, key, tuple(saved.shape), tuple(target.shape)))
        if saved.dtype != target.dtype and not {saved.dtype, target.dtype} <= {*_FLOATS}:
            raise StoreError(misfit(folder, key, saved.dtype, target.dtype))
        if not finite(saved.to(target.dtype), target):
            raise StoreError(
                f"the adapter in {folder} holds NaN or infinity in {key}, in {target.dtype}, so "
                "the model would compute nothing but NaN. Its training has diverged, or its file "
                "is not what was saved."
            )


def fill(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor], folder: Any,
    names: list[str], before: Before,
) -> None:  # fmt: skip
    """Copy saved tensors into the splices of these names and into the base, all or none.

    ``before`` notes what is overwritten.

    Raises:
        StoreError: a tensor is missing, does not fit, or holds NaN or infinity.
    """
    own, rows = base_tensors(model), description["rows"]
    wanted: dict[str, Tensor] = {f"inserted.{n}": t for n, t in full_state(model, names).items()}
    wanted |= _targets(own, description)
    apart = next((key for key, target in wanted.items() if is_of_zero(target)), None)
    if apart is not None:
        raise StoreError(
            f"the adapter in {folder} cannot be read into this model: DeepSpeed's ZeRO-3 has taken "
            f"{apart.partition('.')[2]} apart. Do this before deepspeed.initialize."
        )
    _require_alike(wanted, tensors, folder)
    before.note(target for key, target in wanted.items() if not key.startswith("rows."))
    for name, chosen in rows.items():
        before.note([own[name]], chosen)
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(like(tensors[key], target))
        for name, chosen in rows.items():
            own[name][chosen] = tensors[f"rows.{name}"].to(own[name])


def finite(x: Tensor, own: Tensor | None = None) -> bool:
    """Whether all values are finite, but for those that are not in the model's ``own`` either.

    A buffer may hold infinity, as a mask does. One without values yet is compared later.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return True
    good = (x.float() if x.element_size() == 1 else x).isfinite()
    if bool(good.all()) or own is None:
        return bool(good.all())
    if own.is_meta:
        return not isinstance(own, nn.Parameter)
    return bool((good | ~whole(own.detach()).cpu().float().isfinite()).all())


def misfit(folder: Any, what: str, saved: Any, here: Any) -> str:
    """Return the message that ``what`` differs between the adapter and this model."""
    return (
        f"the adapter in {folder} does not fit this model: {what}: {saved} in the adapter, {here} "
        "here. Load it into the base that it was made for (see 'base' in surgery.json)."
    )
