"""Laws of what is stored: registered tensors, saved adapters, options, merges and removals.

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.host import hosts
from surgery.plugin import opened
from surgery.testing.shapes import Shape
from surgery.testing.trials import close, fresh, inserted_modules, outputs, spliced


def every_tensor_is_registered(method: surgery.Method, shape: Shape) -> None:
    """No parameter, tensor or module stands where its module does not know of it."""
    for module in _as_inserted(method, shape):
        known = {id(x) for x in (*module.parameters(), *module.buffers(), *module.modules())}
        for path, part in module.named_modules():
            where = f"{type(part).__name__}{f' at {path}' if path else ''}"
            for name, value in _held(part):
                if id(value) in known:
                    continue
                mend = _mend(name, value)
                assert not mend, (
                    f"{where}: {name} is {_kind(value)} that its module does not know of, so it "
                    f"is neither trained, moved nor saved. {mend}"
                )


def _as_inserted(method: surgery.Method, shape: Shape) -> Iterator[nn.Module]:
    """Yield the modules that a method inserts, which have not run yet."""
    model = shape.make()
    found = surgery.locate(model, dict(shape.inputs))
    others = [site for site in found.others if site.kind in method.kinds]
    chosen = method.choose([*found, *others])
    parts = {id(x): x for x in (*model.modules(), *model.parameters())}
    shared: dict[str, nn.Module] = {}
    for site in chosen:
        now = opened(site, model, chosen, shared, parts)
        method.splice(now)
        for _, module in now.edits:
            yield module


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield tensors and modules among the plain attributes of a module, and in their containers."""
    if type(module).__module__.partition(".")[0] in ("torch", "surgery"):
        return
    plain = vars(nn.Module())
    for name, value in vars(module).items():
        if name in plain:
            continue
        yield from _inside(name, value, 3)


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield a tensor, or the tensors and modules in a container, with their places."""
    if isinstance(value, Tensor) or (isinstance(value, nn.Module) and "[" in name):
        yield name, value
        return
    inner: Any = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, (list, tuple, set)) else inner
    for key, each in inner if depth else ():
        yield from _inside(f"{name}[{key!r}]", each, depth - 1)


def _kind(value: Any) -> str:
    if isinstance(value, nn.Parameter):
        return "a parameter"
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _mend(name: str, value: Any) -> str:
    """Return how to register a value; '' if it need not be."""
    plain = name.partition("[")[0]
    if isinstance(value, nn.Module):
        holds = any(True for _ in (*value.parameters(), *value.buffers()))
        return f"Hold the modules of {plain} in nn.ModuleList or nn.ModuleDict." if holds else ""
    if isinstance(value, nn.Parameter):
        kind = "nn.ParameterDict" if "['" in name else "nn.ParameterList"
        return f"Hold the parameters of {plain} in {kind}."
    return f"Write self.register_buffer({plain!r}, ...), or nn.Parameter if it is trained."


def saved_and_loaded_is_the_same(method: surgery.Method, shape: Shape) -> None:
    """A saved adapter, loaded into a fresh base, gives the same bits."""
    if surgery.methods().get(method.name) is not type(method):
        raise AssertionError(
            f"no installed plugin offers {method.name!r}, so a saved adapter could not be loaded. "
            "List the plugin in its pyproject.toml and pip install it; in a notebook call "
            f"surgery.register({type(method).__name__})."
        )
    _random_buffers_are_saved(method, shape)
    model = spliced(method, shape)
    expected = outputs(model, shape)
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, folder)
        base = shape.make()
        torch.manual_seed(4)  # a random tensor that is not saved would differ now
        loaded = surgery.load(base, folder, example_inputs=dict(shape.inputs))
    assert torch.equal(outputs(loaded, shape), expected), "the loaded adapter gives other bits"


def _random_buffers_are_saved(method: surgery.Method, shape: Shape) -> None:
    """Raise if a buffer differs from splice to splice and is not saved."""
    drawn = []
    for seed in (5, 6):
        base = shape.make()
        torch.manual_seed(seed)
        drawn.append(inserted_modules(fresh(method, shape, base)))
    for path, module in drawn[0].items():
        saved, other = module.state_dict(), dict(drawn[1][path].named_buffers())
        for name, buffer in module.named_buffers():
            if name not in saved and not torch.equal(buffer, other[name]):
                raise AssertionError(
                    f"buffer {path}.{name} is random and is not saved, so a loaded adapter would "
                    "draw another. Leave out persistent=False, or draw it from a fixed seed."
                )


def switched_off_and_removed_the_base_is_back(method: surgery.Method, shape: Shape) -> None:
    """Switched off, and after removal, the model gives the bits of the base."""
    base = shape.make()
    expected, state = outputs(base, shape), base.state_dict()
    model = spliced(method, shape)
    with surgery.disabled(model):
        assert torch.equal(outputs(model, shape), expected), "switched off, outputs differ"
    surgery.remove(model)
    assert torch.equal(outputs(model, shape), expected), "removed, outputs differ"
    assert list(model.state_dict()) == list(state), "removed, the state dict has other keys"
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()), "weights differ"


def merged_is_the_same_or_refused(method: surgery.Method, shape: Shape) -> None:
    """A merge keeps the outputs, or is refused with the name of the method."""
    model = spliced(method, shape)
    expected = outputs(model, shape)
    refusal = ""
    try:
        surgery.merge(model)
    except surgery.SpliceError as error:
        refusal = str(error)
    if refusal:
        assert repr(method.name) in refusal, f"the refusal does not name the method: {refusal}"
        assert torch.equal(outputs(model, shape), expected), "refused, but something has changed"
        surgery.merge(model, partial=True)
    else:
        assert not hosts(model), "merged, but something is still spliced"
    close(outputs(model, shape), expected, "merged, outputs differ")


def options_survive_json(method: surgery.Method, shape: Shape) -> None:
    """The options of a method are the same after JSON."""
    again = type(method)(**json.loads(json.dumps(method.options())))
    assert again == method, (
        f"{again} came back. JSON has no tuples: let __post_init__ turn a list into a tuple"
    )
