"""Try surgery on the models of other libraries, beside an independent count of their attention.

    python -m tests.zoo.libraries.check [LIBRARY[:MODEL] ...] [--out FILE] [--table FILE.md]

Libraries: diffusers, open_clip, timm, torchvision (the ``zoo`` extra). Models are checked in
a worker process, each with a time limit. One JSON line a model goes to FILE.
"""

from __future__ import annotations

import copy
import importlib
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from tests.support.models import rename
from tests.zoo.build import tensors
from tests.zoo.libraries.counting import attention_modules, projections, run
from tests.zoo.libraries.table import markdown, summary
from tests.zoo.outputs import differ
from tests.zoo.report import failure

LIBRARIES = ("diffusers", "open_clip", "timm", "torchvision")
LIMIT = 600  # seconds for one model
METHODS = {
    "lora": surgery.method("lora", rank=2, ports="all"),
    "ia3": surgery.method("ia3"),
    "bitfit": surgery.method("bitfit"),
    "inducer": surgery.method("inducer", key_rank=2, value_rank=2),
    "prefix": surgery.method("prefix", length=3),
}


def models_of(library: str) -> Any:
    """The module that names and builds the models of a library."""
    return importlib.import_module(f"tests.zoo.libraries.{library}_models")


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [t.clone() for t in tensors(model(**copy.deepcopy(inputs)))]


def check(library: str, name: str) -> dict[str, Any]:
    """Every check of one model."""
    model, inputs = models_of(library).build(name)
    row: dict[str, Any] = {"library": library, "model": name}
    called, softmaxes = run(model, inputs)
    there = {p: m for p, m in attention_modules(model).items() if p in called}
    row["softmax"] = sum(
        any(f"{s}.".startswith(f"{p}.") or p.startswith(f"{s}.") for s in softmaxes) for p in there
    )
    wanted = {name for path, module in there.items() for name in projections(path, module)}
    sites = surgery.locate(model, inputs)
    reached = {port.weight for site in sites for port in site.ports.values()}
    nameless = [s.path for s in sites if any(p.in_width and not p.weight for p in s.ports.values())]
    reached |= {w for w in wanted for path in nameless if f"{w}.".startswith(f"{path}.")}
    linear = {port.weight for site in sites.linear for port in site.ports.values()}
    named = {line.partition(":")[0] for line in sites.overlooked}
    silent = [w for w in wanted - reached - linear if w.removesuffix(".weight") not in named]
    row |= {
        "modules": len(there),
        "attention": len(sites.attention),
        "ffn": len(sites.ffn),
        "linear": len(sites.linear),
        "projections": len(wanted),
        "reached": len(wanted & reached),
        "silent": sorted(silent),
        "lse": sum("lse" in site.ports for site in sites.attention),
    }
    base = outputs(model, inputs)
    for method in METHODS:
        row[method] = attempt(lambda m=method: spliced(model, inputs, sites, METHODS[m], base))
    row["renamed"] = attempt(lambda: same_by_other_names(model, inputs, sites))
    return row


def same_by_other_names(model: nn.Module, inputs: Any, before: surgery.Sites) -> str:
    """Rename every submodule; the same sites must be found. The model is of no use afterwards."""
    renamed = rename(model)
    after = surgery.locate(model, inputs)
    assert [s.ports.keys() for s in after] == [s.ports.keys() for s in before], "other ports"
    assert [s.path for s in after] == [renamed[s.path] for s in before], "other places"
    return "ok"


def attempt(act: Callable[[], str]) -> Any:
    """What ``act`` returns; what it raises as a record."""
    try:
        return act()
    except Exception as error:
        return failure(error)


def spliced(
    model: nn.Module, inputs: Any, sites: surgery.Sites, method: surgery.Method, base: Any
) -> str:
    """Splice a method into every site, move it, and take it out again."""
    at = sites if method.name in ("bitfit", "ia3") else sites.attention
    at = at if len(sites.attention) else None  # type: ignore[assignment]
    keys = list(model.state_dict())
    surgery.splice(model, method, at=at, example_inputs=inputs)
    try:
        if method.start == "exact":
            assert not (gap := differ(base, outputs(model, inputs))), f"start: {gap}"
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(model):
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter) * 0.3)
        assert differ(base, outputs(model, inputs)), "what is inserted changes no output"
    finally:
        surgery.remove(model)
    assert list(model.state_dict()) == keys, "remove leaves other keys"
    assert not (gap := differ(base, outputs(model, inputs))), f"remove: {gap}"
    return "ok"


def rows_of(library: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of some models; a model that takes its process with it gets a row that says so."""
    while names:
        command = [sys.executable, "-m", "tests.zoo.libraries.check", "--worker", library, *names]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"library"'):
                names = names[1:]
                yield json.loads(line)
        if process.wait() and names:
            crash = {"error": "Crash", "message": f"exit {process.returncode}"}
            yield {"library": library, "model": names[0], "crash": crash}
            names = names[1:]


def worker(library: str, names: list[str]) -> None:
    """Print the rows of some models, one JSON line each."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{LIMIT} s")

    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds in its own way
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    for name in names:
        signal.alarm(LIMIT)
        try:
            row = check(library, name)
        except Exception as error:
            row = {"library": library, "model": name, "crash": failure(error)}
        signal.alarm(0)
        print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> None:
    """Check the libraries or models given, or all."""
    out, table = "libraries.jsonl", None
    if "--out" in arguments:
        out = arguments.pop(arguments.index("--out") + 1)
    if "--table" in arguments:
        table = arguments.pop(arguments.index("--table") + 1)
    chosen = [a for a in arguments if not a.startswith("--")] or list(LIBRARIES)
    rows = []
    with open(out, "w") as file:
        for each in chosen:
            library, _, name = each.partition(":")
            for row in rows_of(library, [name] if name else list(models_of(library).names())):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(summary(row), flush=True)
    if table:
        Path(table).write_text(markdown(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
