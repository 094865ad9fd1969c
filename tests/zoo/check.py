"""Try surgery on the whole zoo: locate, splice, start, alive, generate, remove, for every type.

    python -m tests.zoo.check [types...] [--out FILE] [--table docs/coverage.md]

Each type runs in a worker process with a time limit; one JSON line per type goes to FILE, a table
of them all to a Markdown file, and a summary of the failures to the screen.
"""

from __future__ import annotations

import copy
import json
import select
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import surgery
from tests.zoo.build import CannotBuild, Tiny, build, model_types, tensors
from tests.zoo.report import failure, markdown, summary

LIMIT = 240  # seconds for one type
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


# -- one type ----------------------------------------------------------------------------------


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
            _outputs(model, tiny.inputs)
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
            return _outputs(model, self.tiny.make(1))
        if name == "train":
            with _training(model):
                return _outputs(model, inputs)
        if name == "generate":
            given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
            given = copy.deepcopy(given)  # some generate functions write into their inputs
            torch.manual_seed(1)
            with torch.no_grad():
                out = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
            return list(tensors(out))
        return _outputs(model, inputs)

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
                    if not differ(base, _outputs(self.model, self.tiny.inputs)):
                        dead.append(f"{site.kind} {site.path} {site.key}")
        assert not dead, f"{len(dead)} of {total} sites are dead: {dead[:4]}"
        return {"sites": total}

    def remove(self, keys: list[str], base: Any) -> None:
        surgery.remove(self.model)
        assert list(self.model.state_dict()) == keys, "the state_dict has other keys than before"
        if isinstance(base, list):
            difference = differ(base, _outputs(self.model, self.tiny.inputs))
            assert not difference, difference


class _Softmaxes(TorchFunctionMode):
    """Which modules call SDPA or a softmax over the last of three or more axes?"""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.found = [""], set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        wide = name == "softmax" and args[0].dim() > 2 and dim in (-1, args[0].dim() - 1)
        if wide or name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            self.found.add(self.stack[-1])
        return func(*args, **kwargs)


def unclaimed(model: nn.Module, inputs: dict[str, Any], sites: surgery.Sites) -> list[str]:
    """Modules with a softmax that belongs to no attention site: routers, or something missed."""
    seen, handles = _Softmaxes(), []
    for path, module in model.named_modules():

        def enter(module: Any, args: Any, path: str = path) -> None:
            seen.stack.append(path)

        def leave(module: Any, args: Any, out: Any) -> None:
            seen.stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with seen:
            _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    claimed = [f"{s.path}.{s.key.partition('#')[0]}".strip(".") for s in sites.attention]
    return sorted(p for p in seen.found if not any(f"{p}.".startswith(f"{c}.") for c in claimed))


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


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    return [t.clone() for t in tensors(output)]


def differ(a: list[Tensor], b: list[Tensor]) -> str:
    """How two lists of tensors differ; the empty string if every bit is equal."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return f"shapes differ: {len(a)} and {len(b)} tensors"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not torch.equal(x, y) and not bool(((x == y) | ((x != x) & (y != y))).all()):
            gap = (x.double() - y.double()).abs().nan_to_num(nan=float("inf")).max().item()
            return f"tensor {i} of {len(a)} differs by {gap:.2g}"
    return ""


# -- all types ---------------------------------------------------------------------------------


def worker(types: Iterable[str]) -> None:
    """Check types in this process, one JSON line each."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{LIMIT} s")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    for model_type in types:
        signal.alarm(LIMIT)
        try:
            row = check(model_type)
        except Exception as error:
            row = {"type": model_type, "build": "ok", "runs": {}, "crash": failure(error)}
        signal.alarm(0)
        print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> None:
    """Check the types given, or all."""
    out = arguments.pop(arguments.index("--out") + 1) if "--out" in arguments else "zoo.jsonl"
    table = arguments.pop(arguments.index("--table") + 1) if "--table" in arguments else None
    types = [a for a in arguments if not a.startswith("--")] or model_types()
    rows: list[dict[str, Any]] = []
    with open(out, "w") as file:
        while len(rows) < len(types):
            for row in _batch(types[len(rows) : len(rows) + 25]):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(summary(rows))
    if table:
        Path(table).write_text(markdown(rows))


def _batch(types: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of some types, up to the first that takes its process with it."""
    command = [sys.executable, "-m", "tests.zoo.check", "--worker", *types]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for model_type in types:
        ready, _, _ = select.select([process.stdout], [], [], LIMIT + 40)
        line = process.stdout.readline() if ready else ""
        while line and not line.startswith("{"):  # something that a library prints
            line = process.stdout.readline()
        if not line:
            process.kill()
            process.wait()
            crash = {"error": "Crash" if ready else "Hang", "message": f"exit {process.returncode}"}
            yield {"type": model_type, "build": "ok", "runs": {}, "crash": crash}
            return
        yield json.loads(line)
    process.wait()


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main(sys.argv[1:])
