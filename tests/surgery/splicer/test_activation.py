"""use, using, disabled and route: which splices run, for whom, for which rows, and how far."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from tests.support.models import PlainBlock, build, checkpointing, inputs, logits, perturb

METHODS = {
    "lora": surgery.method("lora", rank=2, ports="all"),
    "pre-fix": surgery.method("prefix", length=3),
    "ia3": surgery.method("ia3"),
    "inducer": surgery.method("inducer", key_rank=2, value_rank=2),
    "ffn": surgery.method("ffn_adapter", rank=2),
}
ROUTABLE = [*METHODS]


def adapted(kind: str = "llama", names: Sequence[str] = ROUTABLE, batch: int = 4) -> Any:
    """A model with a splice of each of these methods, and inputs for it."""
    model = build(kind)
    for name in names:
        surgery.splice(model, METHODS[name], name=name, example_inputs=inputs(kind))
    surgery.freeze_base(model)
    perturb(model, 0.3)
    given = inputs(kind, batch=batch)
    return model.double(), {k: x.double() if x.is_floating_point() else x for k, x in given.items()}


def run(model: nn.Module, given: Any, names: Any) -> Tensor:
    with surgery.using(model, names):
        return logits(model, given)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


ENTRY = st.one_of(
    st.none(),
    st.sampled_from(ROUTABLE),
    st.lists(st.sampled_from(ROUTABLE), min_size=1, max_size=2, unique=True),
    st.dictionaries(st.sampled_from(ROUTABLE), st.sampled_from([0.5, 1.0, -1.5]), max_size=2),
)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: adapted(kind) for kind in ("llama", "gpt2", "roberta", "vit")}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta", "vit"])
@given(route=st.lists(ENTRY, min_size=4, max_size=4))
@pytest.mark.few(2)
def test_routing_a_batch_equals_running_its_parts(
    models: dict[str, Any], kind: str, route: list[Any]
) -> None:
    model, given = models[kind]
    with surgery.route(route, model):
        together = logits(model, given)
    for row, entry in enumerate(route):
        alone = run(model, {k: x[row : row + 1] for k, x in given.items()}, entry or [])
        # The lse is float32 in every dtype, so virtual tokens have its rounding.
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def more(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """Windows of an image, experts over flat tokens, and two sequences."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (4, 8))
    if kind == "swin":
        config = tr.SwinConfig(
            image_size=32, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
        )
        return tr.SwinForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}
    if kind == "mixtral":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        return tr.MixtralForCausalLM(tr.MixtralConfig(vocab_size=60, **sizes, **heads)), {
            "input_ids": ids
        }
    config = tr.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return tr.T5ForConditionalGeneration(config), {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :5],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["swin", "mixtral", "t5"])
def test_routing_reaches_windows_experts_and_two_sequences(kind: str) -> None:
    model, given = more(kind)
    model.eval()
    for name in ("lora", "ia3"):
        surgery.splice(model, METHODS[name], name=name, example_inputs=given)
    perturb(model, 0.3)
    route = ["lora", None, "ia3", ["lora", "ia3"]]
    with surgery.route(route, model):
        together = logits(model, given)
    for row, entry in enumerate(route):
        part = {k: x[row : row + 1] for k, x in given.items()}
        alone = run(model, part, entry or [])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_routed_batch_are_those_of_its_parts() -> None:
    model, given = adapted(names=["lora", "inducer"])
    model.train()
    route = ["lora", None, "inducer", "lora"]

    def gradients() -> list[Tensor]:
        made = [p.grad for _, p in surgery.spliced_parameters(model)]
        model.zero_grad()
        return [torch.zeros(()) if g is None else g for g in made]

    for row, entry in enumerate(route):
        part = {k: x[row : row + 1] for k, x in given.items()}
        if entry is not None:
            run(model, part, entry).square().sum().backward()
    expected = gradients()
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing(model)
        with surgery.route(route):
            logits(model, given).square().sum().backward()
        for a, b in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_routed_model_generates_what_each_adapter_generates_alone() -> None:
    model, _ = adapted(names=["lora", "pre-fix"])
    ids = torch.arange(12).reshape(3, 4) + 5
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "pad_token_id": 0}
    for beams in (1, 3):
        with surgery.route(["lora", None, "pre-fix"]):
            together = model.generate(input_ids=ids, num_beams=beams, **options)
        for row, names in enumerate(["lora", [], "pre-fix"]):
            with surgery.using(model, names):
                alone = model.generate(input_ids=ids[row : row + 1], num_beams=beams, **options)
            assert torch.equal(together[row : row + 1], alone)


def test_a_factor_scales_what_an_adapter_changes() -> None:
    layer, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    surgery.splice(layer, surgery.method("lora", rank=2), example_inputs=x)
    perturb(layer, 0.3)
    with surgery.using(layer, []):
        base = layer(x)
    whole = layer(x)
    for factor in (0.0, 0.3, 1.0, -2.0):
        with surgery.using(layer, {"default": factor}):
            close(layer(x), base + factor * (whole - base))


def test_a_choice_of_the_model_holds_for_every_thread_and_one_of_a_context_for_its_own() -> None:
    model, given = adapted(names=["lora", "ia3"])
    expected = {name: run(model, given, name) for name in ("lora", "ia3")}
    surgery.use(model, "lora")
    found: list[Tensor] = []
    with surgery.using(model, "ia3"):
        thread = threading.Thread(target=lambda: found.append(logits(model, given)))
        thread.start()
        thread.join()
        close(logits(model, given), expected["ia3"])
    close(found[0], expected["lora"])

    async def task(name: str) -> Tensor:
        with surgery.route([name] * 4):
            await asyncio.sleep(0)
            return logits(model, given)

    async def every() -> list[Tensor]:
        return list(await asyncio.gather(task("lora"), task("ia3")))

    for a, name in zip(asyncio.run(every()), expected, strict=True):
        close(a, expected[name])


def test_a_copy_of_the_model_has_a_choice_of_its_own() -> None:
    model, given = adapted(names=["lora", "ia3"])
    surgery.use(model, "lora")
    other = copy.deepcopy(model)
    surgery.use(other, "ia3")
    close(logits(model, given), run(other, given, "lora"))
    close(logits(other, given), run(model, given, "ia3"))
    with surgery.using(model, []):
        assert torch.equal(logits(other, given), run(model, given, "ia3"))


def test_what_is_spliced_in_later_is_on_and_what_was_off_stays_off() -> None:
    model, given = adapted(names=["lora", "ia3"])
    surgery.use(model, "lora")
    surgery.splice(model, METHODS["inducer"], name="later", example_inputs=given)
    perturb(model, 0.1)
    close(logits(model, given), run(model, given, ["lora", "later"]))
    surgery.remove(model, "lora")
    close(logits(model, given), run(model, given, "later"))
    surgery.use(model)
    close(logits(model, given), run(model, given, ["ia3", "later"]))


@given(st.lists(st.tuples(st.sampled_from(["add", "use", "remove"]), st.sampled_from("abc"))))
def test_any_order_of_add_use_and_remove_ends_in_the_same_state(steps: Any) -> None:
    """The outputs are those of a model in which only what is left was ever spliced in."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def add(model: nn.Module, name: str) -> None:
        surgery.splice(model, surgery.method("lora", rank=1), name=name, example_inputs=x)
        for key, parameter in surgery.spliced_parameters(model, name):
            torch.manual_seed(ord(name) + len(key))
            nn.init.normal_(parameter)

    model, there, on = small(), list[str](), set[str]()
    for act, name in steps:
        if act == "add" and name not in there:
            add(model, name)
            there.append(name)
            on.add(name)
        elif act == "use" and name in there:
            surgery.use(model, name)
            on = {name}
        elif act == "remove" and name in there:
            surgery.remove(model, name)
            there.remove(name)
            on.discard(name)
    fresh = small()
    for name in there:
        add(fresh, name)
    if there:
        surgery.use(fresh, sorted(on))
    assert torch.equal(model(x), fresh(x))


def small() -> nn.Module:
    torch.manual_seed(0)
    return PlainBlock(8, 2, prenorm=True, fused=True).eval()


def test_wrappers_are_looked_through(tmp_path: Any) -> None:
    model, given = adapted(names=["lora", "ia3"])
    expected = run(model, given, "lora")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, **given: Any) -> Any:
            return self.module(**given)

    wrapped = Wrapper()
    surgery.use(wrapped, "lora")
    close(logits(wrapped, given), expected)
    assert repr(surgery.summary(wrapped)) == repr(surgery.summary(model))
    surgery.save(wrapped, tmp_path / "both", only="lora")
    surgery.remove(wrapped, "ia3")
    with surgery.disabled(torch.compile(model, backend="eager")):
        base = logits(model, given)
    fresh = build("llama").double()
    close(logits(fresh, given), base)
    surgery.load(fresh, tmp_path / "both")
    assert surgery.summary(fresh).states.keys() == {"lora"}
    close(logits(fresh, given), expected)


def test_the_summary_says_what_is_on_and_trained() -> None:
    model, given = adapted(names=["lora", "ia3", "pre-fix"])
    surgery.freeze_base(model, train="ia3")
    surgery.use(model, {"lora": 0.5, "ia3": 1})
    assert surgery.summary(model).states == {
        "lora": "on at 0.5, frozen, float64",
        "ia3": "on, trained, float64",
        "pre-fix": "off, frozen, float64",
    }
    logits(model, given).sum().backward()
    grads = {n: p.grad is not None for n, p in surgery.spliced_parameters(model)}
    assert {n for n, has in grads.items() if has} == {
        n for n, _ in surgery.spliced_parameters(model, "ia3")
    }


@pytest.mark.parametrize(
    "wrong", ["nobody", ["lora", "nobody"], {"nobody": 0}, {"lora": "half"}, 3, {3: 1.0}]
)
def test_a_wrong_choice_is_refused_and_changes_nothing(wrong: Any) -> None:
    model, given = adapted(names=["lora"])
    expected = logits(model, given)
    for choose in (surgery.use, lambda *a: surgery.using(*a).__enter__()):
        with pytest.raises(surgery.SpliceError):
            choose(model, wrong)
    with pytest.raises(surgery.SpliceError):
        surgery.route([wrong, None], model).__enter__()
    assert torch.equal(logits(model, given), expected)


def test_a_name_is_no_route() -> None:
    with (
        pytest.raises(surgery.SpliceError, match=r"route\('ab'\): a route is a list"),
        surgery.route("ab"),
    ):
        pass


def test_a_route_that_cannot_be_is_refused() -> None:
    model, given = adapted(names=["lora"])
    with pytest.raises(surgery.SpliceError, match="one entry for each example"):
        surgery.route([]).__enter__()
    with pytest.raises(surgery.SpliceError, match="Did you mean 'lora'"):
        with surgery.route(["lorra", None]):
            logits(model, given)
    with pytest.raises(surgery.ForwardError, match="3 entries, and this batch 4 rows"):
        with surgery.route(["lora", None, "lora"]):
            logits(model, given)
    surgery.splice(model, surgery.method("prompt", length=2), name="prompt")
    with pytest.raises(surgery.SpliceError, match="runs whole or not at all"):
        surgery.route(["prompt", None, "lora", None], model).__enter__()
    with pytest.raises(surgery.SpliceError, match="Switch it with"):
        surgery.use(model, {"prompt": 0.5})
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False).eval()
    x = torch.randn(4, 6, 8)
    surgery.splice(layer, surgery.method("lora", rank=2, ports="all"), example_inputs=x)
    with pytest.raises(surgery.SpliceError, match="the batch is not the first axis"):
        surgery.route(["default", None], layer).__enter__()


def test_a_choice_costs_no_graph_on_return() -> None:
    model, given = adapted(names=["lora", "ia3"])
    choices: list[Any] = ["lora", ["lora", "ia3"], {"lora": 0.5}, {"lora": 0.25}]

    def count() -> int:
        return sum(map(len, surgery.variants(model).values()))

    for names in choices:
        run(model, given, names)
    with surgery.route(["lora", None, "lora", "ia3"]):
        logits(model, given)
    before = count()
    for names in choices * 2:
        run(model, given, names)
    with surgery.route([None, "ia3", "lora", "lora"]):
        logits(model, given)
    assert count() == before


def test_a_forward_under_way_goes_on_when_another_thread_chooses_anew() -> None:
    model, given = adapted(names=["lora", "ia3"])
    names: Any
    for names in ("lora", "ia3", None, []):
        surgery.use(model, {"lora": 0.5})
        logits(model, given)

        def choose(*_: Any, names: Any = names) -> None:
            thread = threading.Thread(target=surgery.use, args=(model, names))
            thread.start()
            thread.join()

        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(choose)
        logits(model, given)
        hook.remove()
        with surgery.using(model, names or []):
            expected = logits(model, given)
        if names is not None:
            close(logits(model, given), expected)
