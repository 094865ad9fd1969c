"""The model stays the object it was: everything that worked goes on working, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from tests.models import GENERATORS, NAMES, TEXT, build, checkpointing, inputs, logits, perturb

IMPLEMENTATIONS = ("sdpa", "eager")


def both() -> list[surgery.Method]:
    return [
        surgery.method("inducer", key_rank=3, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "key", "value", "output")),
        surgery.method("lora", rank=2, ports=("up", "output")),
    ]


def spliced(name: str, implementation: str = "sdpa") -> Any:
    model = build(name)
    if name != "plain":
        model.set_attn_implementation(implementation)
    surgery.splice(model, both(), example_inputs=inputs(name))
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_generation_is_the_same_with_and_without_cache(
    name: str, implementation: str
) -> None:
    base = build(name)
    base.set_attn_implementation(implementation)
    model = spliced(name, implementation)
    ids = inputs(name)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        case = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(ids, **case), base.generate(ids, **case)), options


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_moved_parameters_does_not_depend_on_the_cache(name: str) -> None:
    model = spliced(name)
    perturb(model)
    ids = inputs(name)["input_ids"]
    case = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **case), model.generate(ids, use_cache=False, **case))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
def test_attentions_and_hidden_states_come_out_as_before(name: str) -> None:
    base = build(name)
    base.set_attn_implementation("eager")
    model = spliced(name, "eager")
    case = inputs(name) | {"output_attentions": True, "output_hidden_states": True}
    a, b = base(**case), model(**case)
    assert len(b.attentions) == 2
    assert len(b.hidden_states) == 3
    for x, y in zip(a.attentions + a.hidden_states, b.attentions + b.hidden_states, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = spliced(name)
    perturb(model)
    surgery.freeze_base(model, fresh=False)
    model.train()
    if reentrant:
        model.enable_input_require_grads() if name != "vit" else _inputs_need_grad(model)
    plain = _gradients(model, name)
    checkpointing(model, reentrant)
    checkpointed = _gradients(model, name)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-6)


def _inputs_need_grad(model: nn.Module) -> None:
    next(model.children()).embeddings.register_forward_hook(lambda m, a, o: o.requires_grad_())


def _gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    logits(model, inputs(name)).pow(2).sum().backward()
    return {k: p.grad.clone() for k, p in surgery.spliced_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_keep_the_splice_and_are_independent(name: str, tmp_path: Path) -> None:
    model, case = spliced(name), inputs(name)
    perturb(model)
    expected = logits(model, case)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, case), expected)
        perturb(twin, seed=9)
        assert not torch.equal(logits(twin, case), expected)
        surgery.remove(twin)
    assert torch.equal(logits(model, case), expected)


@pytest.mark.parametrize("name", NAMES)
def test_types_base_keys_and_attributes_stay(name: str) -> None:
    base, model = build(name), spliced(name)
    keys = list(base.state_dict())
    assert [k for k in model.state_dict() if k in keys] == keys
    modules = dict(model.named_modules())
    for path, module in base.named_modules():
        assert isinstance(modules[path], type(module))
        assert type(modules[path]).__name__ == type(module).__name__
        own = {k for k in vars(module) if not k.startswith("_")}
        assert own <= set(vars(modules[path]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
def test_a_removed_model_saves_and_loads_as_before(name: str, tmp_path: Path) -> None:
    model = surgery.remove(spliced(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), inputs(name)), logits(build(name), inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_on_any_module_fire_once_with_the_same_tensors(name: str) -> None:
    expected, seen = _watch(build(name), name), _watch(spliced(name), name)
    for path, outputs in expected.items():
        assert len(seen[path]) == len(outputs), path
        assert all(map(torch.equal, seen[path], outputs)), path


def _watch(model: Any, name: str) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                seen.setdefault(path, []).append(first)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(watch(path), with_kwargs=True)
    logits(model, inputs(name))
    return seen


def test_a_hook_that_changes_an_output_still_does() -> None:
    model, case = spliced("roberta"), inputs("roberta")
    before = logits(model, case)
    inner = model.roberta.encoder.layer[0].attention.self
    handle = inner.register_forward_hook(lambda m, a, o: (o[0] * 2, *o[1:]))
    assert not torch.equal(logits(model, case), before)
    handle.remove()
    assert torch.equal(logits(model, case), before)


@pytest.mark.parametrize("name", NAMES)
def test_switching_the_attention_implementation_after_the_splice(name: str) -> None:
    if name == "plain":
        return
    base, model = build(name), spliced(name)
    for implementation in ("eager", "sdpa", "eager"):
        base.set_attn_implementation(implementation)
        model.set_attn_implementation(implementation)
        assert torch.equal(logits(model, inputs(name)), logits(base, inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_attribute_is_seen(name: str) -> None:
    base, model = build(name).train(), spliced(name).train()
    for each in (base, model):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    torch.manual_seed(2)
    expected = logits(base, inputs(name))
    torch.manual_seed(2)
    assert torch.equal(logits(model, inputs(name)), expected)


@pytest.mark.parametrize("name", TEXT)
def test_other_lengths_and_batches_need_no_new_graph(name: str) -> None:
    model = spliced(name)
    logits(model, inputs(name))
    before = {p: len(v) for p, v in surgery.variants(model).items()}
    for shape in ((1, 3), (3, 9), (4, 12)):
        logits(model, inputs(name, *shape))
    assert {p: len(v) for p, v in surgery.variants(model).items()} == before


def test_two_splices_are_switched_and_removed_apart() -> None:
    model, case = build("llama"), inputs("llama")
    base = logits(model, case)
    surgery.splice(model, surgery.method("lora"))
    perturb(model)
    first = logits(model, case)
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), name="second")
    assert torch.equal(logits(model, case), first)
    perturb(model, seed=8)
    assert not torch.equal(logits(model, case), first)
    with surgery.disabled(model):
        assert torch.equal(logits(model, case), base)
    surgery.remove(model, "default")
    with surgery.disabled(model, "second"):
        assert torch.equal(logits(model, case), base)
    surgery.remove(model, "second")
    assert torch.equal(logits(model, case), base)


def test_the_trainer_trains_only_what_was_inserted(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = build("gpt2")
    surgery.splice(model, both()[:2])
    surgery.freeze_base(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = inputs("gpt2", 8, 6)["input_ids"].tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    inserted = dict(surgery.spliced_parameters(model))
    for key, value in model.state_dict().items():
        if key not in inserted:
            assert torch.equal(value, before[key]), key
    assert any(not torch.equal(p, before[k]) for k, p in inserted.items())
