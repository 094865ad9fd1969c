"""Laws of a spliced model that runs: its start, its cache, its batch, its dtype.

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

from typing import Any

import torch

import surgery
from surgery.testing.shapes import PAD, Shape
from surgery.testing.trials import close, fresh, outputs, perturb, spliced


def start_is_as_declared(method: surgery.Method, shape: Shape) -> None:
    """In evaluation and in training, with and without padding."""
    for training in (False, True):
        for side in ("no", *(("right", "left") if shape.sides else ())):
            model = shape.make().train(training)
            changed: dict[str, Any] = {}
            seen: Any = slice(None)
            if shape.sides:
                mask = torch.ones_like(shape.inputs["input_ids"])
                mask[0, {"no": slice(0), "right": slice(6, None), "left": slice(3)}[side]] = 0
                changed, seen = {"attention_mask": mask}, mask.bool()
            expected = outputs(model, shape, **changed)[seen]
            fresh(method, shape, model)
            same = torch.equal(outputs(model, shape, **changed)[seen], expected)
            what = "training" if training else "evaluation"
            hint = " Use surgery.Dropout for what is random in training." if training else ""
            assert same or method.start == "none", (
                f"start is {method.start!r}, but outputs differ ({what}, {side} padding).{hint}"
            )


def cached_equals_uncached(method: surgery.Method, shape: Shape) -> None:
    """A sequence in three steps through a KV cache has the outputs of one step."""
    model, ids = spliced(method, shape), shape.inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:6], past_key_values=first.past_key_values, use_cache=True)
        rest = model(input_ids=ids[:, 6:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, rest.logits], 1)
    close(parts, whole, "a sequence in three steps differs from one")


def padding_and_batch_do_not_matter(method: surgery.Method, shape: Shape) -> None:
    """The outputs of a row do not depend on its batch and its padding."""
    model, ids = spliced(method, shape), shape.inputs["input_ids"]
    alone = outputs(model, shape, input_ids=ids[:1, :5])
    batch = outputs(model, shape, input_ids=ids[:, :5])[:1]
    close(batch, alone, "a row in a batch differs from the row alone")
    for side in shape.sides:
        row = torch.full((1, 3), PAD)
        row = torch.cat([ids[:1, :5], row] if side == "right" else [row, ids[:1, :5]], 1)
        batch = torch.cat([row, ids[1:, :8]])
        mask = torch.ones_like(batch)
        real = slice(0, 5) if side == "right" else slice(3, 8)
        mask[0] = 0
        mask[0, real] = 1
        given: dict[str, Any] = {"input_ids": batch, "attention_mask": mask}
        if "left" in shape.sides:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = outputs(model, shape, **given)[:1, real]
        close(padded, alone, f"a row padded on the {side} differs from the row alone")


def hooks_change_nothing(method: surgery.Method, shape: Shape) -> None:
    """An inserted module computes with a hook on it what it computes without one."""
    model = spliced(method, shape)
    plain = outputs(model, shape)
    for path in {name.rpartition(".")[0] for name, _ in surgery.spliced_parameters(model)}:
        model.get_submodule(path).register_forward_hook(lambda *_: None)
    close(outputs(model, shape), plain, "forward(x, onto) is not after_product(x A^T, onto)")


def dtype_and_device_follow_the_site(method: surgery.Method, shape: Shape) -> None:
    """Inserted modules have float32 in place of half precision; outputs have the base's dtype."""
    model = fresh(method, shape, shape.make().bfloat16())
    wrong = [n for n, p in surgery.spliced_parameters(model) if p.dtype != torch.float32]
    assert not wrong, f"{wrong} are not float32"
    perturb(model)
    out = outputs(model, shape)
    assert out.dtype == torch.bfloat16, f"the output is {out.dtype}"
    assert bool(out.isfinite().all()), "in bfloat16 the output is not finite"
