"""Testing: the contract that every method keeps, as one call for its author's tests.

    from surgery.testing import check_method

    def test_the_contract() -> None:
        check_method(MyMethod(rank=4))

It needs transformers, for three small models with random weights that differ in what matters here:
``fused``, a decoder with fused projections, learned positions and biases; ``grouped``, a decoder
with grouped heads, rotary positions, a gated FFN and no bias; ``encoder``, one with its norms
behind the residual.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.host import hosts

VOCABULARY, PAD = 50, 0
SHAPES = ("fused", "grouped", "encoder")


def make_model(shape: str) -> Any:
    """A small model with random weights, in evaluation mode."""
    import transformers as tr

    torch.manual_seed(0)
    special: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    if shape == "fused":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        config: Any = tr.GPT2Config(vocab_size=VOCABULARY, **sizes, **special)
        return tr.GPT2LMHeadModel(config).eval()  # type: ignore[no-untyped-call]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
    if shape == "grouped":
        config = tr.LlamaConfig(num_key_value_heads=2, **sizes, **special)
        return tr.LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    return tr.RobertaForMaskedLM(tr.RobertaConfig(**sizes, **special)).eval()  # type: ignore[no-untyped-call]


@dataclass
class Contract:
    """What was checked: by model, the laws that hold; and where the method was refused, and why."""

    held: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def check_method(method: surgery.Method, shapes: Sequence[str] = SHAPES) -> Contract:
    """Check the contract of a method on small models.

    * its start is the one that it declares, in evaluation and in training, and with padding
    * a gradient reaches every inserted parameter and no parameter of the base
    * a sequence in two steps through a KV cache gives what it gives in one
    * a row gives what it gives alone, whatever its batch and its padding
    * a saved adapter, loaded into a fresh base, gives the same bits
    * switched off or removed, the base's bits are back
    * it is merged, and gives the same, or refused by name
    * what it inserts has the dtype and the device of its site
    * its options survive JSON

    Args:
        method: with any options.
        shapes: on which models: ``fused``, ``grouped``, ``encoder``, as above.

    Returns:
        what was checked. A method may be refused by a model that lacks what it needs.

    Raises:
        AssertionError: a law does not hold, or every model refused; it says which, and where.
        SpliceError: a splice is refused, and why.
    """
    contract = Contract()
    for shape in shapes:
        try:
            surgery.splice(make_model(shape), method)
        except (surgery.SiteError, surgery.PortError) as error:
            contract.refused[shape] = str(error)
            continue
        for law in LAWS:
            name = law.__name__.strip("_").replace("_", " ")
            try:
                law(method, shape)
            except AssertionError as error:
                raise AssertionError(f"{method} on {shape}: {name}: {error}") from error
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise AssertionError(f"{method} on {shape}: {name}: {what}") from error
            contract.held.setdefault(shape, []).append(name)
    if not contract.held:
        raise AssertionError(f"{method} was refused by every model: {contract.refused}")
    return contract


def _start_is_as_declared(method: surgery.Method, shape: str) -> None:
    for training in (False, True):
        for side in ("no", "right", "left"):
            model = make_model(shape).train(training)
            ids = _ids()
            mask = torch.ones_like(ids)
            mask[0, {"no": slice(0), "right": slice(6, None), "left": slice(3)}[side]] = 0
            expected = _logits(model, ids, mask=mask)[mask.bool()]
            surgery.splice(model, method)
            same = torch.equal(_logits(model, ids, mask=mask)[mask.bool()], expected)
            what = "training" if training else "evaluation"
            hint = " In training, draw by surgery.Dropout." if training else ""
            assert same or method.start == "none", (
                f"start is {method.start!r}, but outputs moved ({what}, {side} padding).{hint}"
            )


def _gradients_reach_what_was_inserted_and_nothing_else(method: surgery.Method, shape: str) -> None:
    model = _spliced(method, shape)
    surgery.freeze_base(model, fresh=False)
    inserted = dict(surgery.spliced_parameters(model))
    torch.manual_seed(1)
    (_logits(model, _ids(), train=True) * torch.randn(1)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if name in inserted:
            assert parameter.grad is not None, f"no gradient for {name}"
            assert bool((parameter.grad != 0).any()), f"the gradient of {name} is zero"
        else:
            assert parameter.grad is None, f"a gradient for {name}, which is the base's"


def _cached_equals_uncached(method: surgery.Method, shape: str) -> None:
    model, ids = _spliced(method, shape), _ids()
    if shape == "encoder":  # an encoder has no cache
        return
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:6], past_key_values=first.past_key_values, use_cache=True)
        rest = model(input_ids=ids[:, 6:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, rest.logits], 1)
    _close(parts, whole, "a sequence in three steps differs from one")


def _padding_and_batch_do_not_matter(method: surgery.Method, shape: str) -> None:
    model, ids = _spliced(method, shape), _ids()
    alone = _logits(model, ids[:1, :5])
    _close(_logits(model, ids[:, :5])[:1], alone, "a row in a batch differs from the row alone")
    sides = ("right",) if shape == "encoder" else ("right", "left")
    for side in sides:
        row = torch.full((1, 3), PAD)
        row = torch.cat([ids[:1, :5], row] if side == "right" else [row, ids[:1, :5]], 1)
        batch = torch.cat([row, ids[1:, :8]])
        mask = torch.ones_like(batch)
        real = slice(0, 5) if side == "right" else slice(3, 8)
        mask[0] = 0
        mask[0, real] = 1
        given = {"input_ids": batch, "attention_mask": mask}
        if shape != "encoder":
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            padded = model(**given).logits[:1, real]
        _close(padded, alone, f"a row padded on the {side} differs from the row alone")


def _saved_and_loaded_is_the_same(method: surgery.Method, shape: str) -> None:
    model = _spliced(method, shape)
    if surgery.methods().get(method.name) is not type(method):
        raise AssertionError(
            f"no installed plugin offers {method.name!r}, so a saved adapter could not be loaded. "
            "List the plugin in its pyproject.toml and pip install it."
        )
    expected = _logits(model, _ids())
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, folder)
        fresh = make_model(shape)
        torch.manual_seed(4)  # what is drawn and not saved is drawn otherwise
        loaded = surgery.load(fresh, folder)
    assert torch.equal(_logits(loaded, _ids()), expected), "the loaded adapter gives other bits"


def _switched_off_and_removed_the_base_is_back(method: surgery.Method, shape: str) -> None:
    base = make_model(shape)
    expected, state = _logits(base, _ids()), base.state_dict()
    model = _spliced(method, shape)
    with surgery.disabled(model):
        assert torch.equal(_logits(model, _ids()), expected), "switched off, outputs differ"
    surgery.remove(model)
    assert torch.equal(_logits(model, _ids()), expected), "removed, outputs differ"
    assert list(model.state_dict()) == list(state), "removed, the state dict has other keys"
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()), "weights differ"


def _merged_is_the_same_or_refused(method: surgery.Method, shape: str) -> None:
    model = _spliced(method, shape)
    expected = _logits(model, _ids())
    refusal = ""
    try:
        surgery.merge(model)
    except surgery.SpliceError as error:
        refusal = str(error)
    if refusal:
        assert repr(method.name) in refusal, f"the refusal does not name the method: {refusal}"
        assert torch.equal(_logits(model, _ids()), expected), "refused, but something has changed"
        surgery.merge(model, partial=True)
    else:
        assert not hosts(model), "merged, but something is still spliced"
    _close(_logits(model, _ids()), expected, "merged, it gives something else")


def _dtype_and_device_follow_the_site(method: surgery.Method, shape: str) -> None:
    model = make_model(shape).bfloat16()
    surgery.splice(model, method)
    wrong = [n for n, p in surgery.spliced_parameters(model) if p.dtype != torch.bfloat16]
    assert not wrong, f"{wrong} are not bfloat16"
    _perturb(model)
    out = _logits(model, _ids())
    assert out.dtype == torch.bfloat16, f"the output is {out.dtype}"
    assert bool(out.isfinite().all()), "in bfloat16 the output is not finite"


def _options_survive_json(method: surgery.Method, shape: str) -> None:
    again = type(method)(**json.loads(json.dumps(method.options())))
    assert again == method, (
        f"{again} came back. JSON has no tuples: let __post_init__ make one of a list"
    )


LAWS: tuple[Callable[[surgery.Method, str], None], ...] = (
    _start_is_as_declared,
    _gradients_reach_what_was_inserted_and_nothing_else,
    _cached_equals_uncached,
    _padding_and_batch_do_not_matter,
    _saved_and_loaded_is_the_same,
    _switched_off_and_removed_the_base_is_back,
    _merged_is_the_same_or_refused,
    _dtype_and_device_follow_the_site,
    _options_survive_json,
)


def _spliced(method: surgery.Method, shape: str) -> Any:
    """A model with the method spliced in and moved off its start."""
    model = make_model(shape)
    surgery.splice(model, method)
    _perturb(model)
    return copy.deepcopy(model)


def _perturb(model: nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.05)


def _ids() -> Tensor:
    return torch.arange(18).reshape(2, 9) * 7 % (VOCABULARY - 3) + 3


def _logits(model: Any, ids: Tensor, train: bool = False, mask: Tensor | None = None) -> Tensor:
    torch.manual_seed(3)  # dropout
    with torch.set_grad_enabled(train):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def _close(a: Tensor, b: Tensor, what: str) -> None:
    gap = (a - b).abs().max().item()
    assert gap <= 1e-4 * (1 + b.abs().max().item()), f"{what}, by {gap:.2g}"
