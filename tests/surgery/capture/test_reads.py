"""A captured graph is used only where the answers that its branches got still hold."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.host.state import state_of
from tests.support.forwards import Attention, pair, tokens
from tests.support.models import perturb


class Mode(enum.Enum):
    PLAIN, DOUBLE = 1, 2


class Settings(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mode, self.window, self.dtype = Mode.PLAIN, (1, 1), torch.float32
        self.extra: Any = None
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.factor = torch.ones(16)  # no buffer
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y = y * 3 if self.mode is Mode.DOUBLE else y
        y = y * 2 if self.window == (2, 2) else y
        y = self.act(y.to(self.dtype).to(x.dtype)) * self.factor
        y = y if self.extra is None else y * self.extra(y)
        return y * 7 if self.drop.p > 0 else y


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("mode", Mode.DOUBLE),
        ("window", (2, 2)),
        ("dtype", torch.bfloat16),
        ("extra", nn.Linear(16, 16)),
        ("act", torch.sin),
        ("factor", torch.full((16,), 2.0)),
        ("drop", nn.Dropout(0.5)),
    ],
)
def test_attributes_and_parts_that_are_set_later_are_followed(name: str, new: Any) -> None:
    base, model = pair(Settings)
    before = model(tokens())
    for each in (base, model):
        setattr(each, name, new)
    assert torch.equal(model(tokens()), base(tokens()))
    assert not torch.equal(model(tokens()), before)


class Past:
    """A KV cache of somebody's own."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        return self.keys

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_length(self) -> int:
        return len(self)


class Cached(Attention):
    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        q, k, v = self.heads(x)
        if past is not None:
            if len(past) > 2:
                q = q * 3
            v = k = past.update(k)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def test_how_much_a_cache_holds_is_asked_at_each_call() -> None:
    base, model = pair(Cached)
    pasts = Past(), Past()
    for i in range(5):
        token = tokens()[:, i : i + 1]
        assert torch.equal(*(m(token, p) for m, p in zip((base, model), pasts, strict=True)))


class Afterwards(Cached):
    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        q, k, v = self.heads(x)
        if past is not None:
            v = k = past.update(k)
            if past.get_length() > 5:
                q = q * 3
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def test_what_a_cache_answers_after_its_update_is_not_asked_before() -> None:
    base, model = pair(Afterwards)
    pasts = Past(), Past()
    for part in (tokens(9)[:, :3], tokens(9)[:, 3:5]):
        assert torch.equal(*(m(part, p) for m, p in zip((base, model), pasts, strict=True)))
    with pytest.raises(surgery.ForwardError, match="known only after the KV cache has changed"):
        model(tokens(9)[:, 5:], pasts[1])


class Asks(Attention):
    def forward(self, x: Tensor, mode: Mode = Mode.PLAIN, other: Any = None) -> Tensor:
        y = super().forward(x) * (2 if mode is Mode.DOUBLE else 1)
        n = x.shape[1]
        y = y * (3 if n in {7, 9} else 1) * {5: 2.0, 6: 4.0}.get(n, 1.0) * len(f"{n:04d}{n}")
        return y * 2 if other is not None and hasattr(other, "twice") else y


def test_answers_about_sizes_enums_and_objects_are_those_of_each_call() -> None:
    base, model = pair(Asks)
    plain, twice = SimpleNamespace(), SimpleNamespace(twice=1)
    calls = [(tokens(n), mode) for n in (5, 7, 6, 9, 12) for mode in Mode]
    for call in [*calls, (tokens(), Mode.PLAIN, plain), (tokens(), Mode.PLAIN, twice)]:
        assert torch.equal(model(*call), base(*call))


class Branches(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, -v if q.mean() > 0 else v))


def test_a_branch_that_the_splice_itself_turns_is_an_error_that_names_it() -> None:
    _, model = pair(Branches)
    failed = 0
    for seed in range(20):
        perturb(model, 1.0, seed=seed)
        state = state_of(model)
        assert state is not None
        state.variants.clear()
        try:
            model(tokens())
        except surgery.ForwardError as error:
            failed += "q.mean() > 0" in str(error)
    assert 0 < failed < 20
