"""A tiny random model of every transformer and UNet class of diffusers, with example arguments.

    model, arguments = build("FluxTransformer2DModel")
    model(**arguments)

Two builds of a class are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.zoo.libraries.diffusers_controlnets import CONTROLS, z_image_control
from tests.zoo.libraries.diffusers_parts import Case, made
from tests.zoo.libraries.diffusers_transformers import TWO_STREAMS
from tests.zoo.libraries.diffusers_transformers_image import ONE_STREAM
from tests.zoo.libraries.diffusers_transformers_recent import RECENT
from tests.zoo.libraries.diffusers_transformers_sound import SOUNDS
from tests.zoo.libraries.diffusers_transformers_video import VIDEOS
from tests.zoo.libraries.diffusers_transformers_world import WORLDS
from tests.zoo.libraries.diffusers_unets import UNETS
from tests.zoo.libraries.operators import without_compiled_operators

CASES: dict[str, Case] = (
    TWO_STREAMS | ONE_STREAM | RECENT | VIDEOS | WORLDS | SOUNDS | UNETS | CONTROLS
)
LEFT_OUT: dict[str, str] = {
    "ControlNetXSAdapter": "its forward raises an error: it is a part of UNetControlNetXSModel",
    "CosmosControlNetModel": "its forward needs torchvision",
    "MotionAdapter": "its forward does nothing: it is a part of UNetMotionModel",
}


def names() -> list[str]:
    """The classes that can be built, sorted."""
    return sorted(CASES)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of that class in eval mode, and the arguments of one forward."""
    options, arguments = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with unset_is_nan():
            model: nn.Module = maker(name)(**made(options))
        wake(model)
        return model.eval(), made(arguments)


def maker(name: str) -> Any:
    """What makes a model of the class."""
    without_compiled_operators()
    import diffusers
    from diffusers.models import controlnets, transformers

    if name == "ZImageControlNetModel":
        return z_image_control
    places = (diffusers, transformers, controlnets)
    return next(getattr(place, name) for place in places if hasattr(place, name))


@contextmanager
def unset_is_nan() -> Iterator[None]:
    """Within, a tensor that torch.empty makes is full of NaN, so that one left as it is shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give parameters that start as zeros, or unset, small random values: every part matters."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (not parameter.any() or parameter.isnan().any()):
            parameter.normal_(std=0.1)
