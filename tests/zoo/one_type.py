"""Check one type of model: locate, splice, start, alive, generate, remove."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from tests.zoo.build import CannotBuild, Tiny, build, tensors
from tests.zoo.outputs import differ, outputs
from tests.zoo.report import failure
from tests.zoo.unclaimed import unclaimed

ATTENTION = [surgery.method("inducer", key_rank=2, value_rank=2), surgery.method("lora", rank=2)]


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(torch.tanh(self.down(x)))
        return out


@dataclass(frozen=True)
class Beside(surgery.Method):
    """A parallel adapter: it needs an input and an output alone, as blocks of experts have them."""

    name = "beside"
    kinds = ("ffn",)

    def splice(self, site: surgery.Site) -> None:
        site.port("output").add(Bottleneck(site.width), name=self.name, reads=("input",))


FFN = [Beside()]


def check(model_type: str) -> dict[str, Any]:
    """Every check of one type, with each attention implementation that it has."""
    start = time.perf_counter()
    row: dict[str, Any] = {"type": model_type, "build": "ok", "runs": {}}
    try:
        tiny = build(model_type)
    except CannotBuild as error:
        return row | {"build": str(error)}
    row |= {"task": tiny.task, "inputs": list(tiny.inputs), "class": type(tiny.model).__name__}
    for implementation in ("sdpa", "eager"):
        tiny = build(model_type)  # anew: a copy of some models still calls parts of the original
        model = tiny.model
        try:
            model.set_attn_implementation(implementation)  # type: ignore[operator]
            if model.config._attn_implementation != implementation:  # type: ignore[union-attr]
                raise ValueError("it was not set")
            outputs(model, tiny.inputs)
        except Exception as error:
            row["runs"][implementation] = {"unsupported": str(error)[:200]}
            continue
        row["runs"][implementation] = _Check(model, tiny).all()
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


class _Check:
    """The checks of one model; ``results`` gets "ok", a failure, or why a check was left out."""

    def __init__(self, model: nn.Module, tiny: Tiny) -> None:
        self.model, self.tiny = model, tiny
        self.results: dict[str, Any] = {}
        self.reports: list[Any] = []

    def all(self) -> dict[str, Any]:
        found: list[surgery.Sites] = []
        if not self.do(
            "locate", lambda: found.append(surgery.locate(self.model, self.tiny.inputs))
        ):
            return self.results
        sites = found[0]
        self.results |= {"n_attention": len(sites.attention), "n_ffn": len(sites.ffn)}
        self.results["n_linear"] = len(sites.linear)
        self.results["unclaimed"] = unclaimed(self.model, self.tiny.inputs, sites)
        keys = list(self.model.state_dict())
        before = {name: self.measure(name) for name in ("eval", "train", "batch1", "generate")}
        self.splice("attention", sites.attention, ATTENTION)
        self.splice("ffn", sites.ffn, FFN)
        if not self.reports:
            return self.results
        for name, (kind, base) in before.items():
            if kind == "skip":
                self.results[name] = {"skip": base}
            else:
                self.do(name, lambda name=name, base=base: self.same(name, base))
        self.do("alive", lambda: self.alive(before["eval"][1]))
        self.results["variants"] = max(map(len, surgery.variants(self.model).values()), default=0)
        self.do("remove", lambda: self.remove(keys, before["eval"][1]))
        return self.results

    def do(self, name: str, step: Callable[[], Any]) -> bool:
        try:
            answer = step()
        except TimeoutError:
            raise
        except Exception as error:
            self.results[name] = failure(error)
            return False
        self.results[name] = answer if isinstance(answer, dict) else "ok"
        return True

    def splice(self, name: str, sites: surgery.Sites, methods: list[Any]) -> None:
        """Splice; if that fails, find out which method fails at which sites, and do the others."""
        if not len(sites):
            self.results[name] = {"skip": "no site"}
            return

        def at(chosen: Any, which: surgery.Sites) -> Any:
            return surgery.splice(self.model, chosen, at=which, name=f"zoo_{name}")

        if self.do(name, lambda: self.reports.append(at(methods, sites))):
            return
        good, bad = list(sites), defaultdict(list)
        for site in sites:
            for method in methods:
                try:
                    at(method, sites.where(lambda s, site=site: s is site))
                    surgery.remove(self.model, f"zoo_{name}")
                except TimeoutError:
                    raise
                except Exception as error:
                    bad[method.name].append(failure(error) | {"site": f"{site.path} {site.key}"})
                    good = [s for s in good if s is not site]
        self.results[name]["sites"] = len(sites)
        self.results[name]["bad"] = {m: len(f) for m, f in bad.items()}
        self.results[name]["first"] = {m: f[0] for m, f in bad.items()}
        if good:
            self.do(f"{name}_rest", lambda: self.reports.append(
                at(methods, sites.where(lambda s: any(s is g for g in good)))))  # fmt: skip

    def run(self, name: str) -> list[Tensor]:
        model, inputs = self.model, self.tiny.inputs
        if name == "batch1":
            return outputs(model, self.tiny.make(1))
        if name == "train":
            with _training(model):
                return outputs(model, inputs)
        if name == "generate":
            given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
            given = copy.deepcopy(given)  # some generate functions write into their inputs
            torch.manual_seed(1)
            with torch.no_grad():
                out = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
            return list(tensors(out))
        return outputs(model, inputs)

    def measure(self, name: str) -> tuple[str, Any]:
        """What the unspliced model gives; a reason to skip where that is not reproducible."""
        can = getattr(self.model, "can_generate", lambda: False)
        if name == "generate" and not (can() and "input_ids" in self.tiny.inputs):
            return "skip", "not a text generator"
        try:
            first, second = self.run(name), self.run(name)
        except TimeoutError:
            raise
        except Exception as error:
            return "skip", f"base fails: {type(error).__name__}: {str(error)[:120]}"
        return ("skip", "base is not reproducible") if differ(first, second) else ("ok", first)

    def same(self, name: str, base: list[Tensor]) -> None:
        difference = differ(base, self.run(name))
        assert not difference, difference

    def alive(self, base: Any) -> dict[str, Any]:
        """How many sites change no output when their inserted parameters move."""
        if not isinstance(base, list):
            return {"skip": base}
        if all(bool(t.isnan().all()) for t in base if t.is_floating_point()):
            return {"skip": "base gives NaN"}
        dead, total = [], 0
        for report in self.reports:
            for site in report.sites:
                inserted = [i for i in report.inserted if i.site.identity == site.identity]
                named = [p for i in inserted for p in self.model.get_submodule(i.path).parameters()]
                total += 1
                with _moved(named):
                    if not differ(base, outputs(self.model, self.tiny.inputs)):
                        dead.append(f"{site.kind} {site.path} {site.key}")
        assert not dead, f"{len(dead)} of {total} sites are dead: {dead[:4]}"
        return {"sites": total}

    def remove(self, keys: list[str], base: Any) -> None:
        surgery.remove(self.model)
        assert list(self.model.state_dict()) == keys, "the state_dict has other keys than before"
        if isinstance(base, list):
            difference = differ(base, outputs(self.model, self.tiny.inputs))
            assert not difference, difference


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode; running statistics and flags come back."""
    saved = [(b, b.clone()) for b in model.buffers()]
    model.train()
    try:
        yield
    finally:
        model.eval()
        with torch.no_grad():
            for buffer, old in saved:
                if buffer.shape == old.shape:
                    buffer.copy_(old)


@contextmanager
def _moved(parameters: list[nn.Parameter]) -> Iterator[None]:
    saved = [p.detach().clone() for p in parameters]
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=random).to(p) * 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
