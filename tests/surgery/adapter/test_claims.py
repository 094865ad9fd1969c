"""Claims: an adapter takes no memory that its tensors do not fill, and writes where it may."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import surgery
from surgery.plugin.registry import registry
from tests.support.custom_methods import Times
from tests.support.models import build
from tests.support.splices import built_with, untouched

Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
B = "inserted.transformer.h.0.attn.lora_query.b"
EMBEDDING, MATRIX = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"


def rewritten(folder: Path, edit: Edit) -> Path:
    """Edit the description and the tensors of an adapter; the digest is right afterwards."""
    path = folder / "surgery.json"
    description = json.loads(path.read_text())
    tensors = load_tensors((folder / description["tensors"]).read_bytes())
    edit(description, tensors)
    data = save_tensors(tensors)
    description["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / description["tensors"]).write_bytes(data)
    path.write_text(json.dumps(description))
    return folder


def keeps(name: str, value: Tensor) -> Edit:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        description["kept"].append(name)
        tensors[f"kept.{name}"] = value

    return edit


def has_rows(name: str, rows: list[int], value: Tensor) -> Edit:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        description["rows"][name] = rows
        tensors[f"rows.{name}"] = value

    return edit


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return surgery.save(built_with("gpt2", surgery.method("lora", rank=2)), tmp_path / "adapter")


LARGE = [
    ("lora", {"rank": 2}, {"rank": 10_000_000}),
    ("lora", {"rank": 2}, {"rank": 10**18}),
    ("lora", {"rank": 2}, {"rank": 10**30}),
    ("lora", {"rank": 2}, {"ranks": {"attn": 10_000_000}}),
    ("lora", {"rank": 2}, {"ranks": {r"(.*.*)*\d\d\d$": 2}}),
    ("inducer", {"value_rank": 2}, {"value_rank": 10_000_000}),
    ("prefix", {"length": 2}, {"length": 10_000_000}),
    ("prefix", {"length": 2}, {"share": "global", "hidden": 10_000_000}),
    ("prompt", {"length": 2}, {"length": 100_000_000}),
    ("prompt", {"length": 2}, {"encoder": "ptuning", "hidden": 3_100_000_000}),
    ("ffn_adapter", {"rank": 2}, {"rank": 10_000_000}),
    ("mam_inducer", {"ffn_rank": 2}, {"ffn_rank": 10_000_000}),
]


@pytest.mark.parametrize(("name", "options", "claimed"), LARGE, ids=str)
def test_options_take_no_memory_before_they_are_compared_with_the_tensors(
    name: str, options: dict[str, Any], claimed: dict[str, Any], tmp_path: Path
) -> None:
    folder = surgery.save(built_with("gpt2", surgery.method(name, **options)), tmp_path)
    rewritten(folder, lambda d, _: d["splices"][0]["methods"][0]["options"].update(claimed))
    model = build("gpt2")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(surgery.StoreError, match=str(folder)):
        surgery.load(model, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kB
    assert untouched(model)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda x: x * torch.nan,
    "infinity": lambda x: x + torch.inf,
    "beyond float32": lambda x: x.double() + 1e300,
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex64": lambda x: x * 1j,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "shape": lambda x: x.T.contiguous(),
}


@pytest.mark.parametrize("where", [B, "kept.transformer.ln_f.weight", f"rows.{EMBEDDING}"])
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.few(14)
def test_values_that_are_no_finite_floats_are_refused(
    kind: str, where: str, tmp_path: Path
) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    surgery.train_rows(model, EMBEDDING, [2, 5])
    folder = surgery.save(model, tmp_path)
    if kind == "shape" and "ln_f" in where:
        where = "kept.transformer.ln_f.bias"
        rewritten(folder, lambda _, t: t.update({where: t[where][:3]}))
    else:
        rewritten(folder, lambda _, t: t.update({where: VALUES[kind](t[where])}))
    base = build("gpt2")
    with pytest.raises(surgery.StoreError):
        surgery.load(base, folder)
    assert untouched(base)
    expected = build("gpt2").state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in base.state_dict().items())
    with pytest.raises(surgery.StoreError):
        surgery.restore(model, folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_floating_dtype_is_converted(lora: Path, dtype: torch.dtype) -> None:
    rewritten(lora, lambda _, t: t.update({B: t[B].to(dtype)}))
    model = surgery.load(build("gpt2"), lora)
    assert model.get_parameter(B.removeprefix("inserted.")).dtype == torch.float32


def test_a_run_that_has_diverged_is_told_when_it_is_saved(tmp_path: Path) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    with torch.no_grad():
        next(surgery.spliced_parameters(model))[1].fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"lora_query\.a holds NaN or infinity"):
        surgery.save(model, tmp_path)
    with pytest.raises(surgery.StoreError, match=r"NaN or infinity in inserted.*lora_query\.a"):
        surgery.load(build("gpt2"), tmp_path)


@pytest.mark.parametrize("part", ["kept", "rows"])
def test_no_adapter_writes_to_what_another_splice_has_inserted(lora: Path, part: str) -> None:
    model, name = build("gpt2"), "transformer.h.0.attn.first_ia3_key.scale"
    surgery.splice(model, surgery.method("ia3"), name="first")
    if part == "kept":
        rewritten(lora, keeps(name, torch.full((32,), 7.0)))
    else:
        rewritten(lora, has_rows(name, [0], torch.ones(1)))
    with pytest.raises(surgery.StoreError, match="another splice of this model has inserted"):
        surgery.load(model, lora)
    assert (model.get_parameter(name) == 1).all()


@pytest.mark.parametrize("part", ["kept", "rows"])
def test_a_whole_embedding_is_replaced_only_where_that_is_asked(lora: Path, part: str) -> None:
    own = torch.ones_like(build("gpt2").transformer.wte.weight)
    if part == "kept":
        rewritten(lora, keeps(EMBEDDING, own))
    else:
        rewritten(lora, has_rows(EMBEDDING, [*range(len(own))], own))
    model = build("gpt2")
    with pytest.raises(
        surgery.StoreError, match=r"whole embedding transformer\.wte\.weight .*keep="
    ):
        surgery.load(model, lora)
    assert untouched(model)
    surgery.load(model, lora, keep=["transformer.wte"])
    assert torch.equal(model.transformer.wte.weight, own)
    surgery.restore(model, lora)  # the model keeps it now


def test_what_an_adapter_replaces_in_the_base_is_told(
    lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix, norm = build("gpt2").get_parameter(MATRIX).detach(), torch.ones(32)
    rewritten(lora, keeps(MATRIX, matrix * 2))
    rewritten(lora, keeps("transformer.ln_f.weight", norm))
    with caplog.at_level(logging.WARNING, "surgery"):
        with pytest.warns(UserWarning, match=rf"{lora} replaces {MATRIX} of the base"):
            surgery.load(build("gpt2"), lora)
    assert f"{lora} replaces transformer.ln_f.weight" in caplog.text
    surgery.load(build("gpt2"), lora, keep=[MATRIX])  # a warning is an error here


@dataclass(frozen=True)
class ReadsValues(surgery.Method):
    """A method that reads its values when it is made, which the meta device does not have."""

    name, kinds = "reads_values", ("ffn",)
    size: int = 2

    def splice(self, site: surgery.OpenSite) -> None:
        module = Times(site.width, 1.0)
        assert module.a.sum().item() == site.width
        site.port("output").insert(module, name=self.name)


def test_a_method_that_cannot_be_rehearsed_is_loaded_unless_it_asks_for_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = registry()._offered["method"]
    monkeypatch.setitem(offered, ReadsValues.name, (ReadsValues, "tests"))
    folder = surgery.save(built_with("gpt2", ReadsValues()), tmp_path)
    assert surgery.summary(surgery.load(build("gpt2"), folder)).inserted == 64
    rewritten(folder, lambda d, _: d["splices"][0]["methods"][0].update(options={"size": 10**9}))
    with pytest.raises(surgery.StoreError, match=r"its options .* make no modules"):
        surgery.load(build("gpt2"), folder)
