"""Watch: values by site and port, gradients, early stops, threads, and nothing left behind."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build, checkpointing, inputs, logits

NAMES = ("gpt2", "llama", "bert", "vit")


def modules_run(model: nn.Module) -> list[str]:
    """The paths of the modules that run from now on, as a list that grows."""
    run: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, path=path: run.append(path))
    return run


@pytest.mark.parametrize("name", NAMES)
def test_values_of_every_port_and_no_bit_changes(name: str) -> None:
    model, case = build(name), inputs(name)
    base = logits(model, case)
    keys = set(model.state_dict())
    ports = ("query", "query_heads", "context", "merged", "lse", "output", "call")
    with surgery.watch(model, ports) as seen:
        assert torch.equal(logits(model, case), base)
    sites = surgery.locate(model)
    n = 5 if name == "vit" else 7
    assert seen[sites.attention[0], "lse"].shape == (2, 4, n)
    assert seen[sites.attention[1].path, "query_heads"].shape == (2, 4, n, 8)
    assert seen[list(sites.block)[1], "call"].shape == (2, n, 32)
    assert len(seen) == 2 * len(ports) + 2  # the outputs of the FFN, too
    assert set(model.state_dict()) == keys
    assert not surgery.summary(model).reports
    assert torch.equal(logits(model, case), base)


def test_the_values_are_those_of_hooks_and_stay_when_the_model_goes_on() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    met: list[torch.Tensor] = []
    model.transformer.h[1].mlp.register_forward_hook(lambda m, a, y: met.append(y))
    with surgery.watch(model, "output") as seen:
        logits(model, case)
        first = seen["transformer.h.1.mlp", "output"]
        logits(model, inputs("gpt2", seed=9))
    assert torch.equal(first, met[-2])
    assert torch.equal(seen["transformer.h.1.mlp", "output"], met[-1])
    assert not first.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_autograd(name: str, frozen: bool) -> None:
    model, case = build(name), inputs(name)
    model.requires_grad_(not frozen)
    sites = surgery.locate(model)
    with surgery.watch(model, "output", gradients=True) as seen:
        logits(model, case).square().sum().backward()
    site = sites.ffn[0]
    step = 1e-3 * torch.randn(seen[site, "output"].shape)
    found = (seen.gradients[site, "output"] * step).sum()
    with torch.no_grad():
        sides = []
        for sign in (1, -1):
            report = surgery.insert(model, site, "output", lambda h, s=sign: h + s * step)
            sides.append(logits(model, case).double().square().sum())
            surgery.remove(model, report.name)
    torch.testing.assert_close(found.double(), (sides[0] - sides[1]) / 2, rtol=0.02, atol=1e-5)


def test_a_stop_runs_no_module_behind_the_last_watched_port() -> None:
    model, case = build("llama", depth=4), inputs("llama")
    sites = surgery.locate(model).ffn
    run = modules_run(model)
    logits(model, case)
    whole = len(run)
    with surgery.watch(model, "output", at=sites[:2]) as seen:
        run.clear()
        for _ in range(2):
            with seen.stop():
                model(**case)
                pytest.fail("the block must have ended")
    assert "model.layers.1.mlp" in run
    assert not [path for path in run if path.startswith(("model.layers.2", "lm_head"))]
    assert len(run) < 2 * 0.6 * whole
    assert len(seen) == 2
    run.clear()
    logits(model, case)
    assert len(run) == whole


def test_a_stop_in_generation_and_a_port_that_is_never_read() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    sites = surgery.locate(model)
    with surgery.watch(model, "output", at=sites[0]) as seen:
        with seen.stop():
            model.generate(**case, max_new_tokens=3)
            pytest.fail("the block must have ended")
        out = None
        with seen.stop():
            out = model.transformer.wte(case["input_ids"])
    assert out is not None


@pytest.mark.parametrize("ends", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_block_leaves_nothing(ends: type[BaseException]) -> None:
    model, case = build("gpt2"), inputs("gpt2")
    base, kind = logits(model, case), type(model.transformer.h[0].attn)
    with pytest.raises(ends), surgery.watch(model, "output"):
        raise ends
    assert torch.equal(logits(model, case), base)
    assert type(model.transformer.h[0].attn) is kind
    assert not [name for name in vars(model) if "surgery" in name]


def test_a_watch_sees_under_every_choice_of_splices() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    surgery.splice(model, surgery.method("lora", rank=2), name="a")
    with surgery.using(model, "a"), surgery.watch(model, "output") as seen:
        logits(model, case)
    assert len(seen) == 4
    with surgery.watch(model, "output") as seen:
        with surgery.disabled(model):
            logits(model, case)
    assert len(seen) == 4
    with surgery.watch(model, "output") as seen, surgery.route(["a", None]):
        logits(model, case)
    assert len(seen) == 4
    assert [report.name for report in surgery.summary(model).reports] == ["a"]


def test_removing_everything_inside_the_block_ends_the_watch() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    with surgery.watch(model, "output") as seen:
        surgery.remove(model)
        logits(model, case)
    assert len(seen) == 0


def test_other_threads_are_not_watched() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    with surgery.watch(model, "output") as seen:
        other = threading.Thread(target=lambda: logits(model, case))
        other.start()
        other.join()
        assert len(seen) == 0
        with pytest.raises(surgery.PortError, match="no forward has run it yet, in the thread"):
            seen["transformer.h.0.mlp", "output"]


def test_gradient_checkpointing_repeats_no_reading() -> None:
    model, case = build("gpt2").train(), inputs("gpt2")
    checkpointing(model)
    met: list[torch.Tensor] = []
    surgery.read(model, surgery.locate(model).ffn[0], "output", met.append)
    logits(model, case).sum().backward()
    assert len(met) == 1


def test_a_compiled_model_is_watched() -> None:
    model, case = build("llama"), inputs("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), surgery.watch(model, "output") as seen:
        logits(compiled, case)
    assert len(seen) == 4


def test_errors_name_what_is_watched() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    site = surgery.locate(model).attention[0]
    text = (
        "watch: none of the 1 sites has a port 'outptu'. Did you mean 'output'? Ports here: "
        f"{', '.join(site.ports)}."
    )
    with pytest.raises(surgery.PortError, match=f"^{re.escape(text)}$"):
        with surgery.watch(model, "outptu", at=site):
            pass
    with surgery.watch(model, "output", at=site) as seen:
        logits(model, case)
    text = (
        "port 'output' of 'transformer.h.1.attn' is not watched. Did you mean "
        "'transformer.h.0.attn, output'? Watched here: transformer.h.0.attn, output."
    )
    with pytest.raises(surgery.PortError, match=f"^{re.escape(text)}$"):
        seen["transformer.h.1.attn", "output"]
    text = (
        "port 'output' of transformer.h.0.attn: no gradient has reached it. Pass gradients=True to "
        "surgery.watch, run the forward with gradients enabled, and call backward() on a result "
        "that depends on it."
    )
    with pytest.raises(surgery.PortError, match=f"^{re.escape(text)}$"):
        seen.gradients[site, "output"]
