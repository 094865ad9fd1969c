"""A captured graph is used only where everything that its forward read is as it was."""

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
        state.refresh()
        try:
            model(tokens())
        except surgery.ForwardError as error:
            failed += "q.mean() > 0" in str(error)
    assert 0 < failed < 20


# -- everything that a forward may depend on ------------------------------------------------------


class Remembering(Attention):
    """Attention that keeps tensors of its own: an attribute, an entry, an item."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.table: dict[str, Tensor] = {}
        self.log: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.table:
            self.table["bias"] = self.inward.weight.sum(1)[:16]
        y = super().forward(x) + self.table["bias"]
        if self.last is not None:
            y = y + self.last.mean()
        self.last = y
        self.log.append(y)
        self.calls += 1
        return y


def test_what_a_forward_keeps_is_kept_and_read_again() -> None:
    base, model = pair(Remembering)
    assert not model.table
    assert not model.log
    for n in (5, 5, 3, 5):
        assert torch.equal(model(tokens(n)), base(tokens(n)))
    assert torch.equal(model.last, base.last)
    assert torch.equal(model.table["bias"], base.table["bias"])
    assert all(map(torch.equal, model.log, base.log))
    assert (model.calls, len(model.log)) == (base.calls, len(base.log)) == (4, 4)
    for each in (model, base):
        each.table.clear()
        with torch.no_grad():
            each.inward.weight.mul_(2)
    assert torch.equal(model(tokens()), base(tokens()))


class Sorting(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.seen = [3.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.reverse()
        return super().forward(x) * self.seen[0]


def test_a_change_that_a_graph_cannot_hold_is_refused() -> None:
    model = Sorting()
    with pytest.raises(surgery.SurgeryError, match="changes a list that it keeps"):
        surgery.splice(model, surgery.method("lora", rank=2), example_inputs=tokens())
    assert model.seen == [3.0, 1.0]
