"""Laws that hold for random architectures, inputs, dtypes, methods and options."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import surgery
from tests.support.models import GENERATORS, NAMES, TEXT, build, inputs, logits, perturb

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.15}
ATTENTION_PORTS = ("query", "key", "value", "output")


@st.composite
def methods(draw: Any, dropout: bool = False) -> list[surgery.Method]:
    """A list of one to three methods with random options."""
    p = draw(st.sampled_from([0.1, 0.5])) if dropout else 0.0
    inducer = st.builds(
        lambda k, v: surgery.method("inducer", key_rank=k, value_rank=v, dropout=p),
        st.integers(0, 4),
        st.integers(1, 4),
    )
    some = st.lists(st.sampled_from(ATTENTION_PORTS), min_size=1, unique=True).map(tuple)
    lora = st.builds(
        lambda r, ports, bias: surgery.method("lora", rank=r, ports=ports, bias=bias, dropout=p),
        st.integers(1, 4),
        st.one_of(some, st.just(("up", "output"))),
        st.booleans(),
    )
    adapter = st.builds(
        lambda r, place, norm: surgery.method(
            "ffn_adapter", rank=r, placement=place, layer_norm=norm, dropout=p
        ),
        st.integers(1, 4),
        st.sampled_from(["houlsby", "attention", "pfeiffer", "parallel", "block"]),
        st.booleans(),
    )
    prefix = st.builds(
        lambda n, share: surgery.method(
            "prefix", length=n, gate=True, std=0.5, share=share, hidden=3, dropout=p
        ),
        st.integers(1, 4),
        st.sampled_from(["none", "simple", "linear", "layer", "global"]),
    )
    rest = st.sampled_from(["ia3", "ssl", "ssb", "ntk_attention"]).map(surgery.method)
    kinds = st.one_of(inducer, lora, adapter, prefix, rest)
    return draw(st.lists(kinds, min_size=1, max_size=3))


@st.composite
def models(draw: Any, names: tuple[str, ...] = NAMES) -> tuple[str, Any]:
    """A random architecture of one of the kinds, under a random attention implementation."""
    name = draw(st.sampled_from(names))
    heads = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]))
    model = build(
        name,
        head_width=draw(st.sampled_from([4, 6, 8])),
        heads=heads,
        kv_heads=kv_heads,
        depth=draw(st.integers(1, 3)),
        prenorm=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    if name != "plain":
        model.set_attn_implementation(draw(st.sampled_from(["sdpa", "eager"])))
    return name, model.to(draw(st.sampled_from(list(TOLERANCE))))


def cast(model: Any, given_inputs: dict[str, Any]) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given_inputs.items()}


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9))
splices = st.shared(methods(), key="methods")


def operate(model: Any, name: str, chosen: list[surgery.Method]) -> surgery.Report:
    return surgery.splice(model, chosen, example_inputs=cast(model, inputs(name)))


def padding(batch: int, length: int, side: str) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    return mask if side == "left" else mask.flip(1)


@given(models(), splices, st.lists(sizes, min_size=1, max_size=3), st.booleans())
def test_a_fresh_splice_changes_no_bit(named: Any, chosen: Any, shapes: Any, train: bool) -> None:
    name, model = named
    model.train(train)
    cases = [cast(model, inputs(name, *shape)) for shape in shapes]
    expected = [_seeded(model, case) for case in cases]
    operate(model, name, chosen)
    for case, output in zip(cases, expected, strict=True):
        assert torch.equal(_seeded(model, case), output)


@given(models(TEXT[:-1]), splices, st.sampled_from(["left", "right"]), sizes)
def test_a_fresh_splice_changes_no_bit_under_padding(
    named: Any, chosen: Any, side: str, shape: Any
) -> None:
    name, model = named
    case = inputs(name, *shape) | {"attention_mask": padding(*shape, side)}
    expected = logits(model, case)
    operate(model, name, chosen)
    output = logits(model, case)
    assert torch.equal(output.isnan(), expected.isnan())  # in float64 some bases mask with -inf
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())


@given(models(), splices, sizes)
def test_removed_and_disabled_are_the_original(named: Any, chosen: Any, shape: Any) -> None:
    name, model = named
    case = cast(model, inputs(name, *shape))
    weights = copy.deepcopy(model.state_dict())
    types = [type(m) for m in model.modules()]
    expected = logits(model, case)
    operate(model, name, chosen)
    perturb(model)
    with surgery.disabled(model):
        assert torch.equal(logits(model, case), expected)
    surgery.remove(model)
    assert torch.equal(logits(model, case), expected)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == types
    assert not any("surgery" in key for m in model.modules() for key in vars(m))


@given(models(GENERATORS), splices, st.integers(1, 3), st.integers(3, 9), st.data())
def test_cached_equals_uncached(
    named: Any, chosen: Any, batch: int, length: int, data: st.DataObject
) -> None:
    name, model = named
    operate(model, name, chosen)
    perturb(model)
    ids = inputs(name, batch, length)["input_ids"]
    cut = data.draw(st.integers(1, length - 1))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :cut], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for i in range(cut, length):
            step = model(input_ids=ids[:, i : i + 1], past_key_values=cache)
            parts.append(step.logits)
    assert_close(torch.cat(parts, 1), whole)


@given(models(TEXT[:-1]), splices, st.sampled_from(["left", "right"]))
def test_padding_does_not_matter(named: Any, chosen: Any, side: str) -> None:
    name, model = named
    operate(model, name, chosen)
    perturb(model)
    length, extra = 5, 3
    ids = inputs(name, 2, length)["input_ids"]
    pad = torch.zeros(2, extra, dtype=torch.long)
    ones = torch.ones_like(ids)
    left = side == "left" and name != "bert" and name != "roberta"
    padded = torch.cat([pad, ids] if left else [ids, pad], 1)
    mask = torch.cat([pad, ones] if left else [ones, pad], 1)
    case = {"input_ids": padded, "attention_mask": mask}
    if name in GENERATORS:
        case["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone, together = logits(model, {"input_ids": ids}), logits(model, case)
    if together.dim() == 3:
        together = together[:, extra:] if left else together[:, :length]
    assert_close(together, alone)


@given(models((*GENERATORS, "plain")), splices, st.integers(2, 9), st.data())
def test_later_tokens_do_not_change_earlier_outputs(
    named: Any, chosen: Any, length: int, data: st.DataObject
) -> None:
    name, model = named
    operate(model, name, chosen)
    perturb(model)
    ids = inputs(name, 2, length)["input_ids"]
    at = data.draw(st.integers(1, length - 1))
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 1) % 60
    with torch.no_grad():
        a, b = logits(model, {"input_ids": ids}), logits(model, {"input_ids": other})
    assert_close(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


@given(models(), splices)
def test_gradients_reach_what_was_inserted_and_nothing_else(named: Any, chosen: Any) -> None:
    name, model = named
    operate(model, name, chosen)
    perturb(model)
    surgery.freeze_base(model)
    logits(model, cast(model, inputs(name))).float().pow(2).sum().backward()
    inserted = dict(surgery.spliced_parameters(model))
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in inserted), key
    for key, parameter in inserted.items():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), key


@given(models(), splices, st.sampled_from(["train", "eval", "no_grad"]), st.data())
def test_every_inserted_module_is_alive(
    named: Any, chosen: Any, mode: str, data: st.DataObject
) -> None:
    name, model = named
    report = operate(model, name, chosen)
    perturb(model, 0.3)
    model.train(mode == "train")
    case = cast(model, inputs(name))
    inserted = data.draw(st.sampled_from(report.inserted))
    with torch.set_grad_enabled(mode != "no_grad"):
        before = _seeded(model, case)
        with torch.no_grad():
            for parameter in model.get_submodule(inserted.path).parameters():
                parameter.mul_(-3.0)
        assert not torch.equal(_seeded(model, case), before)


@given(models(), st.shared(methods(dropout=True), key="dropping"))
def test_adapter_dropout_leaves_the_training_outputs_of_the_base(named: Any, chosen: Any) -> None:
    name, model = named
    model.train()
    case = cast(model, inputs(name))
    expected = _seeded(model, case)
    operate(model, name, chosen)
    assert torch.equal(_seeded(model, case), expected)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("gpt2", "roberta"))) for n in NAMES],
)
@settings(max_examples=settings().max_examples // 2)  # for each of six models
@given(splices)
@pytest.mark.few(1)
def test_saving_and_loading_is_the_identity(tmp_path_factory: Any, name: str, chosen: Any) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    model, case = build(name), inputs(name)
    surgery.splice(model, chosen, example_inputs=case)
    perturb(model)
    surgery.save(model, folder)
    loaded = surgery.load(build(name), folder, example_inputs=case)
    assert torch.equal(logits(loaded, case), logits(model, case))
    assert surgery.summary(loaded).inserted == surgery.summary(model).stored
    surgery.save(model, folder, plain=False)
    loaded = surgery.load(build(name), folder, example_inputs=case)
    assert torch.equal(logits(loaded, case), logits(model, case))
    assert repr(surgery.summary(loaded)) == repr(surgery.summary(model))


def _seeded(model: Any, case: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(11)
    return logits(model, case).detach()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = TOLERANCE[a.dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
