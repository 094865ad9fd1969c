"""A captured forward does what the forward itself would do now, to everything that it touches."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CohereConfig, CohereForCausalLM

import surgery
from surgery.host.state import state_of
from tests.models import build, inputs, perturb


class Attention(nn.Module):
    """Attention over (B, n, 16) in 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = self.inward(x).chunk(3, -1)
        return [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in parts]

    def merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.outward(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))


def pair(kind: type[nn.Module], *example: Any) -> tuple[Any, Any]:
    """A model, and a copy of it with two methods spliced in that start as it is."""
    torch.manual_seed(1)
    base = kind().eval()
    model = copy.deepcopy(base)
    methods = [
        surgery.method("inducer", key_rank=2, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "value")),
    ]
    surgery.splice(model, methods, example_inputs=example or (some(),))
    return base, model


def some(n: int = 5) -> Tensor:
    return torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n))


class Counts(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return super().forward(self.norm(x.mT).mT)


def test_buffers_that_a_forward_writes_to_move_with_its_calls_alone() -> None:
    base, model = pair(Counts)
    for each in (base, model):
        each.train()
        for _ in range(2):
            each(some())
    ours = dict(model.named_buffers())
    assert all(torch.equal(ours[name], buffer) for name, buffer in base.named_buffers())
    assert int(ours["calls"]) == int(ours["norm.num_batches_tracked"]) == 2


class InPlace(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None, first: bool = False) -> Tensor:
        if first:
            x[:, 0] = x[:, 0] * 3
        if mask is not None:
            mask += 1
        return super().forward(x)


def test_what_a_forward_writes_to_its_arguments_is_written_once() -> None:
    base, model = pair(InPlace)
    marks = torch.zeros(3), torch.zeros(3)
    for _ in range(2):
        given = some(), some()
        made = [m(g, k, True) for m, g, k in zip((base, model), given, marks, strict=True)]
        assert torch.equal(*made)
        assert torch.equal(*given)
        assert torch.equal(*marks)


class Widened(Attention):
    """Scores in a lower dtype take something of a wider one, in place; a constant is theirs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT
        scores += torch.linspace(0, 1, x.shape[1])
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.merge(scores.softmax(-1).to(v.dtype) @ v)


def test_autocast_chooses_the_graph() -> None:
    base, model = pair(Widened)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(some()), base(some()))


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
    before = model(some())
    for each in (base, model):
        setattr(each, name, new)
    assert torch.equal(model(some()), base(some()))
    assert not torch.equal(model(some()), before)


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
        token = some()[:, i : i + 1]
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
    for part in (some(9)[:, :3], some(9)[:, 3:5]):
        assert torch.equal(*(m(part, p) for m, p in zip((base, model), pasts, strict=True)))
    with pytest.raises(surgery.SpliceError, match="known only after the KV cache has changed"):
        model(some(9)[:, 5:], pasts[1])


class PlainCache(Attention):
    def forward(self, x: Tensor, past: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if past is not None:
            k = torch.cat([past["k"], k], 2) if "k" in past else k
            past["k"] = v = k
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def test_a_dict_that_a_forward_fills_is_refused() -> None:
    _, model = pair(PlainCache)
    with pytest.raises(surgery.CaptureError, match="changes a dict that it is given"):
        model(some(), {})


class Asks(Attention):
    def forward(self, x: Tensor, mode: Mode = Mode.PLAIN, other: Any = None) -> Tensor:
        y = super().forward(x) * (2 if mode is Mode.DOUBLE else 1)
        n = x.shape[1]
        y = y * (3 if n in {7, 9} else 1) * {5: 2.0, 6: 4.0}.get(n, 1.0) * len(f"{n:04d}{n}")
        return y * 2 if other is not None and hasattr(other, "twice") else y


def test_answers_about_sizes_enums_and_objects_are_those_of_each_call() -> None:
    base, model = pair(Asks)
    plain, twice = SimpleNamespace(), SimpleNamespace(twice=1)
    calls = [(some(n), mode) for n in (5, 7, 6, 9, 12) for mode in Mode]
    for call in [*calls, (some(), Mode.PLAIN, plain), (some(), Mode.PLAIN, twice)]:
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
            model(some())
        except surgery.CaptureError as error:
            failed += "q.mean() > 0" in str(error)
    assert 0 < failed < 20


class Wrapped(nn.Module):
    """The projections and the output in modules of their own, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.outward = nn.Identity()  # type: ignore[assignment]
        self.outward = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outward(self.inner(x))
        return out


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_inside_a_host_fire(register: str) -> None:
    base, model = pair(Wrapped)
    seen: list[list[Tensor]] = []
    for each in (base, model):
        found: list[Tensor] = []
        getattr(each.inner, register)(lambda module, *grads, f=found: f.append(grads[0][0]))
        each(some().requires_grad_()).sum().backward()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1][0], seen[0][0])


def test_a_capture_is_not_seen_by_modes_that_are_on() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=2))
    counts = []
    for _ in range(2):  # the first call of a new structure is captured
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs("gpt2", batch=3, length=5), use_cache=False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_queries_that_are_rotated_in_float32_reach_an_inducer_in_their_own_dtype() -> None:
    config = CohereConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = CohereForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.arange(8).unsqueeze(0)
    expected = model(ids).logits
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2))
    assert torch.equal(model(ids).logits, expected)
