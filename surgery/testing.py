"""Check that a method keeps the contract of all methods, in one call for its author's tests.

    from surgery.testing import check_method

    def test_the_contract() -> None:
        check_method(MyMethod(rank=4))

Each law of ``LAWS`` is tried on three small models with random weights, made by transformers:

    fused     a decoder with a fused projection of query, key and value, learned positions, biases
    grouped   a decoder with grouped heads, rotary positions, a gated FFN and no bias
    encoder   an encoder with its norms behind the residual
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
    """Return a small model with random weights, in evaluation mode."""
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
    """The result of ``check_method``.

    Attributes:
        held: the laws that hold, by model.
        refused: why the method cannot be spliced into a model, by model.
    """

    held: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def check_method(method: surgery.Method, shapes: Sequence[str] = SHAPES) -> Contract:
    """Check the contract of a method on small models.

    * The start is as declared, in evaluation and in training, with and without padding.
    * A gradient reaches every inserted parameter and no parameter of the base.
    * A sequence in three steps through a KV cache has the outputs of one step.
    * The outputs of a row do not depend on its batch and its padding.
    * An inserted module computes with a hook on it what it computes without one, where it may add
      to the port itself or share a product with others.
    * A saved adapter, loaded into a fresh base, gives the same bits.
    * Switched off, and after removal, the model gives the bits of the base.
    * A merge keeps the outputs, or is refused with the name of the method.
    * Inserted modules have the device of their site, and its dtype, but float32 in place of half
      precision; the output has the base's dtype.
    * The options survive JSON.

    Args:
        method: the method, with any options.
        shapes: the models to check it on: ``fused``, ``grouped``, ``encoder``.

    Returns:
        the laws that hold. A model that lacks a site or port which the method needs is noted as
        refused.

    Raises:
        AssertionError: a law does not hold, or no model can be spliced; the message names the law
            and the model.
        SpliceError: a splice is refused for another reason.
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
        raise AssertionError(f"{method} cannot be spliced into any model: {contract.refused}")
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
            hint = " Use surgery.Dropout for what is random in training." if training else ""
            assert same or method.start == "none", (
                f"start is {method.start!r}, but outputs differ ({what}, {side} padding).{hint}"
            )


def _gradients_reach_what_was_inserted_and_nothing_else(method: surgery.Method, shape: str) -> None:
    model = _spliced(method, shape)
    surgery.freeze_base(model, fresh=False)
    inserted = dict(surgery.spliced_parameters(model))
    if not method.learns and not inserted:
        return
    torch.manual_seed(1)
    (_logits(model, _ids(), train=True) * torch.randn(1)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if name in inserted:
            assert parameter.grad is not None, f"no gradient for {name}"
            assert bool((parameter.grad != 0).any()), f"the gradient of {name} is zero"
        else:
            assert parameter.grad is None, f"a gradient for {name}, a parameter of the base"


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


def _hooks_change_nothing(method: surgery.Method, shape: str) -> None:
    model = _spliced(method, shape)
    plain = _logits(model, _ids())
    for path in {name.rpartition(".")[0] for name, _ in surgery.spliced_parameters(model)}:
        model.get_submodule(path).register_forward_hook(lambda *_: None)
    _close(_logits(model, _ids()), plain, "forward(x, onto) is not after_product(x A^T, onto)")


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
        torch.manual_seed(4)  # a random tensor that is not saved would differ now
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
    _close(_logits(model, _ids()), expected, "merged, outputs differ")


def _dtype_and_device_follow_the_site(method: surgery.Method, shape: str) -> None:
    model = make_model(shape).bfloat16()
    surgery.splice(model, method)
    wrong = [n for n, p in surgery.spliced_parameters(model) if p.dtype != torch.float32]
    assert not wrong, f"{wrong} are not bfloat16"
    _perturb(model)
    out = _logits(model, _ids())
    assert out.dtype == torch.bfloat16, f"the output is {out.dtype}"
    assert bool(out.isfinite().all()), "in bfloat16 the output is not finite"


def _options_survive_json(method: surgery.Method, shape: str) -> None:
    again = type(method)(**json.loads(json.dumps(method.options())))
    assert again == method, (
        f"{again} came back. JSON has no tuples: let __post_init__ turn a list into a tuple"
    )


LAWS: tuple[Callable[[surgery.Method, str], None], ...] = (
    _start_is_as_declared,
    _gradients_reach_what_was_inserted_and_nothing_else,
    _cached_equals_uncached,
    _padding_and_batch_do_not_matter,
    _hooks_change_nothing,
    _saved_and_loaded_is_the_same,
    _switched_off_and_removed_the_base_is_back,
    _merged_is_the_same_or_refused,
    _dtype_and_device_follow_the_site,
    _options_survive_json,
)


def _spliced(method: surgery.Method, shape: str) -> Any:
    """Return a model with the method spliced in and its parameters moved off their start."""
    model = make_model(shape)
    surgery.splice(model, method)
    _perturb(model)
    return copy.deepcopy(model)


def _perturb(model: nn.Module) -> None:
    """Move every inserted parameter off its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.05)


def _ids() -> Tensor:
    """Return token ids (2, 9), none of them special."""
    return torch.arange(18).reshape(2, 9) * 7 % (VOCABULARY - 3) + 3


def _logits(model: Any, ids: Tensor, train: bool = False, mask: Tensor | None = None) -> Tensor:
    torch.manual_seed(3)  # dropout
    with torch.set_grad_enabled(train):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def _close(a: Tensor, b: Tensor, what: str) -> None:
    """Raise unless ``a`` and ``b`` agree to 1e-4, plus 1e-4 of the largest number in ``b``."""
    gap = (a - b).abs().max().item()
    assert gap <= 1e-4 * (1 + b.abs().max().item()), f"{what}, by {gap:.2g}"
