"""Settings for every test: one thread, quiet transformers, reproducible Hypothesis."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tiny models: a second thread costs more than it does

settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("slow", parent=settings.get_profile("default"), max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of real data run where $SURGERY_DATA says where they are."""
    if "SURGERY_DATA" not in os.environ:
        without = [item for item in items if item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
