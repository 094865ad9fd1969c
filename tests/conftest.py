"""Settings for every test: one thread, quiet transformers, reproducible Hypothesis.

Tests are in two tiers. The default one has each method, law and kind of model once or twice; the
slow one (marker ``slow``) has what repeats them over further options, models and backends. Of a
test with ``few(n)`` n cases, spread evenly over all, are in the default tier and the rest in the
slow one.
Hypothesis tries few examples of a property by default and many under HYPOTHESIS_PROFILE=slow.
"""

import gc
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

gc.disable()  # until all is imported, see pytest_collection_finish
torch.set_num_threads(1)  # tiny models: a second thread costs more than it does

settings.register_profile(
    "default",
    deadline=None,
    max_examples=10,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("slow", parent=settings.get_profile("default"), max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put cases into the slow tier; tests of real data run where $SURGERY_DATA says they are."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        count = each[0].get_closest_marker("few").args[0]  # type: ignore[union-attr]
        kept = {i * len(each) // count for i in range(count)}
        for item in [item for i, item in enumerate(each) if i not in kept]:
            item.add_marker(pytest.mark.slow)
    if "SURGERY_DATA" not in os.environ:
        without = [item for item in items if item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def pytest_collection_finish() -> None:
    """Keep the collector from walking the imported libraries again and again.

    torch, transformers and the collected tests are millions of objects that stay. Each full
    collection visited them all: a quarter of the CPU time of a contract test.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # graphs are many small objects that live
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def four_bits_alike_on_every_processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep bitsandbytes from packing weights anew, which it does on CPUs with AVX512-BF16 alone.

    A packed layer has no gradient, rounds otherwise, and is an error for widths under 64.
    """
    if request.node.get_closest_marker("cases"):
        modules = importlib.import_module("bitsandbytes.nn.modules")
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
