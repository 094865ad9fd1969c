"""Plugins come in through one door, one by one; a broken one does not stop the others."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.plugin.registry import Registry, in_order, registry
from tests.support.custom_methods import Custom, Twice
from tests.support.entry_points import plugin, point


def test_hook_register_methods_brings_the_built_ins_in() -> None:
    assert {"lora", "inducer"} <= set(surgery.methods())
    assert type(surgery.method("lora")) is surgery.methods()["lora"]


def test_one_that_fails_to_import_is_reported_and_the_others_go_on() -> None:
    plugin("plugin_good", "good")
    made = Registry()
    with pytest.warns(RuntimeWarning, match="'bad' .* could not be loaded: ModuleNotFoundError"):
        made.load([point("bad", "plugin_missing"), point("good", "plugin_good")])
    assert set(made.methods()) == {"good"}
    with pytest.raises(surgery.MethodError, match="could not be loaded"):
        made.method("bad", {})


def test_two_plugins_of_one_name_and_two_methods_of_one_name_are_told() -> None:
    plugin("plugin_one", "same")
    plugin("plugin_two", "same")
    made = Registry()
    with pytest.warns(RuntimeWarning, match="two plugins are called 'x'"):
        made.load([point("x", "plugin_one"), point("x", "plugin_two")])
    with pytest.warns(RuntimeWarning, match="'x' and 'y' both offer a method 'same'"):
        made.load([point("y", "plugin_two")])
    assert set(made.methods()) == {"same"}


def test_hook_is_leaf_keeps_a_module_whole() -> None:
    from surgery.capture.forward import capture

    class Inner(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Any) -> Any:
            return self.inner(x) * 2

    class Whole:
        @surgery.hookimpl
        def is_leaf(self, module: nn.Module, path: str) -> bool | None:
            return True if isinstance(module, Inner) else None

    made = Registry()
    outer, args = Outer(), (torch.ones(2),)
    opened = capture(outer, Outer.forward, args, {}, {"inner"}, is_leaf=made.is_leaf)
    assert "call_module" not in {n.op for n in opened.graph.nodes}
    made.add(Whole(), "whole")
    kept = capture(outer, Outer.forward, args, {}, {"inner"}, is_leaf=made.is_leaf)
    assert "call_module" in {n.op for n in kept.graph.nodes}


def test_hook_find_sites_must_return_nodes_of_the_graph() -> None:
    graph, other = torch.fx.Graph(), torch.fx.Graph()
    node, stranger = graph.placeholder("x"), other.placeholder("x")
    answers: list[Any] = []

    class Finder:
        @surgery.hookimpl
        def find_sites(self, graph: Any, root: nn.Module) -> Any:
            return answers[-1]

    made = Registry()
    made.add(Finder(), "finder")
    whole = surgery.FoundAttention(node, node, node, node, context=node)
    for answer in (None, [], [whole]):
        answers.append(answer)
        assert made.find_sites(graph, nn.Module()) == (answer or [])
    for answer, told in (
        ([node], "must return a list of surgery.FoundAttention"),
        ([surgery.FoundAttention(node, node, stranger, node, context=node)], "with key="),
    ):
        answers.append(answer)
        with pytest.raises(surgery.SiteError, match=told):
            made.find_sites(graph, nn.Module())


def test_the_registry_is_made_once() -> None:
    assert registry() is registry()


def test_hook_register_tasks_brings_the_built_ins_in_by_the_same_door() -> None:
    assert {"sst2", "mnli", "webnlg", "coqa", "sentence_classification"} <= set(surgery.tasks())
    assert surgery.task("sst2", held_out=5) == surgery.tasks()["sst2"](held_out=5)
    with pytest.raises(surgery.RecipeError, match=r"no task 'sst'. Did you mean 'sst2'\?"):
        surgery.task("sst")


def task_plugin(name: str, task_name: str, base: type = surgery.Task) -> None:
    """Put a plugin module with a task where an entry point can import it."""

    @dataclass(frozen=True)
    class Made(base):  # type: ignore[misc, valid-type]
        """A task."""

        name = task_name

    module: Any = types.ModuleType(name)
    module.register_tasks = surgery.hookimpl(lambda register: register(Made))
    sys.modules[name] = module


def test_two_tasks_of_one_name_are_told_and_a_failing_plugin_stops_no_other() -> None:
    task_plugin("tasks_one", "same")
    task_plugin("tasks_two", "same")
    task_plugin("tasks_three", "other")
    task_plugin("tasks_four", "", object)
    made = Registry()
    with pytest.warns(RuntimeWarning) as told:
        made.load(
            [point(n[6:], n) for n in ("tasks_one", "tasks_two", "tasks_four", "tasks_three")]
        )
    texts = [str(warning.message) for warning in told]
    assert "plugins 'one' and 'two' both offer a task 'same'" in texts[0]
    assert "does not derive from surgery.Task" in texts[1]
    assert set(made.tasks()) == {"same", "other"}


def test_a_task_that_lacks_a_method_says_which() -> None:
    task_plugin("tasks_bare", "bare")
    made = Registry()
    made.load([point("bare", "tasks_bare")])
    with pytest.raises(surgery.RecipeError, match=r"task Made does not implement splits\(\)"):
        made.task("bare", {}).splits()


def test_unknown_method_and_option_name_the_nearest() -> None:
    with pytest.raises(surgery.MethodError, match=r"no method 'lroa'. Did you mean 'lora'\?"):
        surgery.method("lroa")
    with pytest.raises(surgery.MethodError, match=r"no option 'rnak'. Did you mean 'rank'\?"):
        surgery.method("lora", rnak=3)


def test_plugins_that_offer_nothing_are_reported() -> None:
    made = Registry()
    wrong: Any = types.SimpleNamespace(
        register_method=surgery.hookimpl(lambda register: register(Custom))
    )
    with pytest.raises(surgery.MethodError, match=r"no hook .register_method"):
        made.add(wrong, "typo")
    silent: Any = types.SimpleNamespace(register_methods=surgery.hookimpl(lambda register: Custom))
    with pytest.raises(surgery.MethodError, match="'silent' offers nothing"):
        made.add(silent, "silent")

    class Plain(surgery.Method):
        name = "plain"
        rank: int = 3

    for offered, what in ((Plain, "not a dataclass"), (Custom(), r"not a class. Call register")):
        bad: Any = types.SimpleNamespace(
            register_methods=surgery.hookimpl(lambda register, offered=offered: register(offered))
        )
        with pytest.raises(surgery.MethodError, match=what):
            made.add(bad, "bad")
    assert not made.methods()


def test_no_plugin_takes_the_place_of_a_built_in() -> None:
    plugin("plugin_aaa", "lora")
    made = Registry()
    with pytest.warns(RuntimeWarning, match="'aaa' .* could not be loaded.*both offer .*'lora'"):
        made.load(in_order([point("aaa", "plugin_aaa"), point("lora", "surgery_plugins.lora")]))
    assert made.methods()["lora"] is registry().methods()["lora"]


@dataclass(frozen=True)
class Other:
    """No method at all."""


def test_a_plugin_that_offers_something_else_is_told_so() -> None:
    class Plugin:
        @surgery.hookimpl
        def register_methods(self, register: Any) -> None:
            register(Other)
            register(Twice)

    with pytest.raises(surgery.MethodError, match="Other"):
        Registry().add(Plugin(), "odd")


def test_two_methods_of_one_name_in_one_plugin_clash() -> None:
    @dataclass(frozen=True)
    class Again(Twice):
        name = "twice"

    class Plugin:
        @surgery.hookimpl
        def register_methods(self, register: Any) -> None:
            register(Twice)
            register(Again)

    with pytest.raises(surgery.MethodError, match="'both' offers 2 methods 'twice': Twice, Again"):
        Registry().add(Plugin(), "both")
