"""Check every built-in method on this device: start, gradients, cache, generation, compilation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import surgery
from benchmarks.gpu.record import Cells, Record
from surgery.testing import make_model

TITLE = "Every built-in method, on two small decoders"
OPTIONS: dict[str, dict[str, Any]] = {  # the models have 32 positions
    "tokens": {"tokens": tuple(range(3, 20))},
    "prompt": {"length": 5},
}
SHAPES = ("grouped", "fused")
NEAR, GRADIENT = 1e-4, 2e-3


def ids_for(device: str) -> Tensor:
    return (torch.arange(22, device=device).reshape(2, 11) * 5) % 40 + 3


def spliced(name: str, shape: str, device: str, moved: bool = True) -> Any:
    """Return a small model with the method in it, its parameters moved off their start."""
    model = make_model(shape).to(device)
    surgery.splice(model, surgery.method(name, **OPTIONS.get(name, {})))
    surgery.freeze_base(model, fresh=False)
    if moved:
        torch.manual_seed(2)
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(model):
                noise = torch.randn(parameter.shape) * 0.1
                parameter.add_(noise.to(parameter))
    return model


def start(name: str, shape: str, device: str) -> None:
    """With and without padding, in float32 and bfloat16, the start is that of the base."""
    for dtype in (torch.float32, torch.bfloat16):
        base, ids = make_model(shape).to(device, dtype), ids_for(device)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        method = surgery.method(name, **OPTIONS.get(name, {}))
        with torch.no_grad():
            expected = base(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            surgery.splice(base, method)
            found = base(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        same = method.start == "none" or torch.equal(found, expected)
        assert same, f"start: {shape} {dtype} differs from the base by {_gap(found, expected):.1e}"


def gradients(name: str, shape: str, device: str) -> float:
    """Return the largest relative error of a gradient against float64 on the CPU.

    It is 0 for a method that inserts no parameter.
    """
    model, ids = spliced(name, shape, device), ids_for(device)
    if not any(True for _ in surgery.spliced_parameters(model)):
        return 0.0
    reference = copy.deepcopy(model).cpu().double()
    for each in (model, reference):
        on = ids.to(each.device)
        each(input_ids=on, labels=on).loss.backward()
    found = dict(surgery.spliced_parameters(model))
    worst = 0.0
    for key, parameter in surgery.spliced_parameters(reference):
        grad, own = parameter.grad, found[key].grad
        if grad is None or own is None:
            raise AssertionError(f"gradients: {shape} none for {key}")
        scale = max(float(grad.norm()), 1e-6)
        worst = max(worst, float((own.double().cpu() - grad).norm()) / scale)
    assert worst <= GRADIENT, f"gradients: {shape} {worst:.1e}"
    return worst


def cached(model: Any, ids: Tensor) -> float:
    """Return how far three steps through a cache are from one forward."""
    with torch.no_grad():
        whole, cache = model(input_ids=ids).logits, DynamicCache()
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])
        ]
    gap = _gap(torch.cat(parts, 1), whole)
    assert gap <= NEAR, f"cached - uncached: {gap:.1e}"
    return gap


def generated(model: Any, ids: Tensor) -> None:
    """Greedy generation, with either cache, chooses what a loop without a cache chooses."""
    expected = ids
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    settings |= {"attention_mask": torch.ones_like(ids), "disable_compile": True}
    with torch.no_grad():
        for kind in ("dynamic", "static"):
            out = model.generate(input_ids=ids, cache_implementation=kind, **settings)
            if kind == "dynamic":
                expected = out
                scores = model(input_ids=out).logits[:, ids.shape[1] - 1 : -1].clone()
                scores[..., 2] = -torch.inf  # the end of a text, which min_new_tokens forbids
                best = scores.max(-1).values
                chosen = scores.gather(-1, out[:, ids.shape[1] :, None])[..., 0]
                assert bool((best - chosen <= NEAR).all()), "generate: not the most likely tokens"
            assert torch.equal(out, expected), f"generate: another text with the {kind} cache"


def compiled(model: Any, ids: Tensor) -> float:
    """Return how far the outputs of the model are from those of its compiled twin."""
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = torch.compile(model, backend="aot_eager")(input_ids=ids).logits
    gap = _gap(found, expected)
    assert gap <= NEAR, f"compile: {gap:.1e}"
    return gap


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def check(record: Record, tiny: bool) -> None:
    """Fill the table: a row for each method, a column for each law; if tiny, on one model each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in surgery.methods():

        def row(name: str = name) -> Cells:
            refused, worst = [], {"gradients": 0.0, "cached": 0.0, "compiled": 0.0}
            for shape in SHAPES:
                try:
                    model = spliced(name, shape, device)
                except (surgery.SiteError, surgery.PortError):
                    refused.append(shape)
                    continue
                start(name, shape, device)
                ids = ids_for(device)
                worst["gradients"] = max(worst["gradients"], gradients(name, shape, device))
                worst["cached"] = max(worst["cached"], cached(model, ids))
                generated(model, ids)
                if shape == SHAPES[0] or refused:  # compiling takes longest
                    worst["compiled"] = compiled(model, ids)
                if tiny:  # one model is enough
                    break
            assert len(refused) < len(SHAPES), "no model has a site for it"
            cells = {what: f"{value:.1e}" for what, value in worst.items()}
            declared = surgery.method(name, **OPTIONS.get(name, {})).start
            start_cell = "bit for bit" if declared != "none" else "declares none"
            generates = "both caches" if not refused else f"both caches; no site in {refused[0]}"
            return {"start": start_cell, **cells, "generates": generates}

        record.attempt(TITLE, name, row, needs=5, limit=40)
