"""Insert, replace and read: what the model computes then, what is refused, exact removal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits

NAMES = ("gpt2", "llama", "bert", "vit")


def twice(h: Tensor) -> Tensor:
    return 2 * h


def outputs(model: nn.Module, path: str, given: dict[str, Any]) -> Tensor:
    """The output of a module in a forward, by a hook."""
    found: list[Any] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, a, y: found.append(y))
    logits(model, given)
    hook.remove()
    return found[-1][0] if isinstance(found[-1], tuple) else found[-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("port", ["query", "value", "merged", "output", "context"])
def test_an_insertion_at_every_port_changes_outputs_and_is_removed_to_the_bit(
    name: str, port: str
) -> None:
    model, case = build(name), inputs(name)
    base = logits(model, case).detach()
    report = surgery.insert(model, surgery.locate(model).attention, port, twice)
    assert not torch.equal(logits(model, case), base)
    with surgery.disabled(model):
        assert torch.equal(logits(model, case), base)
    surgery.remove(model, report.name)
    assert torch.equal(logits(model, case), base)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_a_function_at_the_output_is_a_forward_hook(name: str) -> None:
    model, case = build(name), inputs(name)
    site = surgery.locate(model).ffn[0]
    hook = model.get_submodule(site.path).register_forward_hook(lambda m, a, y: 2 * y)
    expected = logits(model, case)
    hook.remove()
    surgery.insert(model, site, "output", twice)
    assert torch.equal(logits(model, case), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_hidden_states_of_a_block_are_its_port_call(name: str) -> None:
    model, case = build(name), inputs(name)
    block = next(iter(surgery.locate(model).block))
    before = outputs(model, block.path, case)
    surgery.insert(model, block, "call", twice)
    torch.testing.assert_close(outputs(model, block.path, case), 2 * before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_takes_the_place_of_an_ffn(name: str) -> None:
    model, case = build(name), inputs(name)
    site = surgery.locate(model).ffn[1]
    ffn = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 32))
    met: list[Tensor] = []
    surgery.replace(model, site, "output", ffn, name="ffn")
    surgery.read(model, site, "output", met.append)
    x: list[Tensor] = []
    surgery.read(model, site, "input", x.append)
    logits(model, case)
    torch.testing.assert_close(met[0], ffn(x[0]))
    surgery.freeze_base(model, train=["ffn"])
    logits(model, case).sum().backward()
    assert all(p.grad is not None for p in ffn.parameters())


def test_a_tensor_takes_the_place_of_a_port_whatever_the_example_was() -> None:
    model, case = build("gpt2"), inputs("gpt2", batch=3, length=5)
    site = surgery.locate(model).ffn[0]
    value = torch.randn(3, 5, 32)
    surgery.replace(model, site, "output", value)
    with surgery.watch(model, "output", at=site) as seen:
        logits(model, case)
    assert torch.equal(seen[site, "output"], value)
    text = (
        "replace at port 'output' of transformer.h.0.mlp: the tensor has the shape (3, 5, 32), and "
        "the port (2, 7, 32) in this forward. Give a tensor that broadcasts to it, or a function "
        "that changes a part of the port."
    )
    with pytest.raises(surgery.ForwardError, match=f"^{re.escape(text)}$"):
        logits(model, inputs("gpt2"))


def test_a_function_may_read_several_ports() -> None:
    model, case = build("llama"), inputs("llama")
    site = surgery.locate(model).attention[0]

    def by_lse(merged: Tensor, lse: Tensor) -> Tensor:
        assert lse.shape == (2, 4, 7)
        heads = merged.unflatten(-1, (4, -1))
        return (heads * torch.sigmoid(lse).transpose(1, 2)[..., None]).flatten(-2)

    base = logits(model, case)
    surgery.replace(model, site, "merged", by_lse, reads=("merged", "lse"))
    assert not torch.equal(logits(model, case), base)


def test_one_module_for_several_sites_has_one_set_of_parameters() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    shared = nn.Linear(32, 32)
    surgery.insert(model, surgery.locate(model).ffn, "output", shared)
    assert sum(p.numel() for _, p in surgery.spliced_parameters(model)) == 32 * 32 + 32
    logits(model, case).sum().backward()
    assert shared.weight.grad is not None


def test_a_list_has_one_for_each_site() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    sites = surgery.locate(model).ffn
    surgery.replace(model, sites, "output", [torch.zeros(32), torch.ones(32)])
    with surgery.watch(model, "output", at=sites) as seen:
        logits(model, case)
    assert [seen[site, "output"].unique().tolist() for site in sites] == [[0.0], [1.0]]


def test_read_collects_each_value_and_never_one_of_the_example() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    met: list[Tensor] = []
    surgery.read(model, surgery.locate(model).ffn[0], "output", met.append)
    assert met == []
    base = build("gpt2").generate(**case, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**case, max_new_tokens=4, do_sample=False), base)
    assert [x.shape[1] for x in met] == [7, 1, 1, 1]


def test_a_probe_is_trained_on_what_it_reads() -> None:
    model, case = build("llama"), inputs("llama")
    probe, results = nn.Linear(32, 2), list[Tensor]()
    site = surgery.locate(model).ffn[1]
    surgery.read(model, site, "output", lambda h: results.append(probe(h)))
    logits(model, case)
    results[0].sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache_equals_one_without(name: str) -> None:
    model, case = build(name), inputs(name)
    surgery.insert(model, surgery.locate(model), "output", lambda h: 1.5 * h)
    runs = [
        model.generate(**case, max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_a_compiled_model_has_the_insertion() -> None:
    model, case = build("llama"), inputs("llama")
    surgery.insert(model, surgery.locate(model).ffn, "output", twice)
    expected = logits(model, case)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, case), expected)


def test_names_are_the_verb_and_a_number() -> None:
    model = build("gpt2")
    site = surgery.locate(model).ffn[0]
    names = [surgery.insert(model, site, "output", twice).name for _ in range(2)]
    named = surgery.insert(model, site, "output", twice, name="mine").name
    assert [*names, named] == ["insert", "insert_2", "mine"]


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    (
        "qeury",
        twice,
        surgery.PortError,
        "causal self-attention at transformer.h.0.attn: no port 'qeury'. Did you mean 'query'? ",
    ),
    (
        "output",
        3,
        surgery.SpliceError,
        "insert: 3 is not possible. Pass an nn.Module or a function.",
    ),
    (
        "output",
        [twice, twice],
        surgery.SpliceError,
        "insert: a list of 2 was given for 1 sites. Give one for each site, or one for all.",
    ),
    (
        "lse",
        twice,
        surgery.PortError,
        "insert at port 'lse' of transformer.h.0.attn: 'lse' can only be read. Edit another port.",
    ),
    (
        "output",
        nn.Linear(32, 16),
        surgery.SpliceError,
        "transformer.h.0.attn: the forward fails with insert spliced in: insert at port 'output' "
        "of transformer.h.0.attn: what was inserted returns the shape ",
    ),
]


@pytest.mark.parametrize(("port", "what", "error", "text"), WRONG)
def test_what_is_refused_changes_nothing(
    port: str, what: Any, error: type[Exception], text: str
) -> None:
    model, case = build("gpt2"), inputs("gpt2")
    base = logits(model, case)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        surgery.insert(model, surgery.locate(model).attention[0], port, what)
    assert torch.equal(logits(model, case), base)
    assert not surgery.summary(model).reports


def test_a_function_that_returns_nothing_is_an_error_of_the_forward() -> None:
    model = build("gpt2")
    surgery.insert(model, surgery.locate(model).ffn[0], "output", lambda h: None)
    text = (
        "insert at port 'output' of transformer.h.0.mlp: what was inserted returns None, where the "
        "port has the shape (2, 7, 32). Return a tensor of that shape. An edit in place needs a "
        "return, too."
    )
    with pytest.raises(surgery.ForwardError, match=f"^{re.escape(text)}$"):
        logits(model, inputs("gpt2"))


def test_no_sites_are_refused() -> None:
    model = build("gpt2")
    text = (
        "there is no site in what was given. Print surgery.locate(model); blocks, norms and linear "
        "layers are in its .block, .norm and .linear."
    )
    with pytest.raises(surgery.SiteError, match=f"^{re.escape(text)}$"):
        surgery.insert(model, surgery.locate(model).attention.layers(7, 9), "output", twice)


def test_a_port_that_no_projection_makes_is_replaced_by_name_only() -> None:
    model = build("gpt2")
    site = surgery.locate(model).attention[0]
    text = (
        "replace at port 'merged' of transformer.h.0.attn: no projection makes it, so nothing says "
        "what the new value is made of. Pass reads=, such as reads=('merged',)."
    )
    with pytest.raises(surgery.PortError, match=f"^{re.escape(text)}$"):
        surgery.replace(model, site, "merged", twice)


def test_no_file_holds_a_function(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.insert(model, surgery.locate(model).ffn[0], "output", twice, name="mine")
    text = (
        "splice 'mine' cannot be saved: it holds modules or functions of yours, and a file holds "
        "tensors and numbers alone. Name the others in only=, or surgery.remove(model, 'mine') "
        "first."
    )
    with pytest.raises(surgery.SpliceError, match=f"^{re.escape(text)}$"):
        surgery.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_returns_a_tuple_is_told_by_shapes_not_by_numbers() -> None:
    model = build("gpt2")
    sites = surgery.locate(model).ffn
    told = r"a tuple of \(2, 7, 32\) torch\.float32, where"
    surgery.insert(model, sites, "output", lambda h: (h,))
    with pytest.raises(surgery.ForwardError, match=told):
        model(**inputs("gpt2"))
