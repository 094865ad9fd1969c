"""LoRA on embeddings, heads, convolutions and stacked experts, against dense weights and PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

import surgery
from tests.support.mixtures import HEADS, IDS, SIZES, moe
from tests.support.models import build, logits
from tests.support.pictures import CONVOLUTIONS, Pictures, pictures


def gemma() -> Any:
    """A model that scales its embedding, and ties it to its head."""
    torch.manual_seed(0)
    config = tr.Gemma3TextConfig(**SIZES, **HEADS, head_dim=8, pad_token_id=0)
    return tr.Gemma3ForCausalLM(config).eval()


def lora(*ports: str, **options: Any) -> surgery.Method:
    return surgery.method("lora", rank=3, alpha=6.0, ports=ports, **options)


def randomised(model: nn.Module) -> None:
    torch.manual_seed(1)
    for _, parameter in surgery.spliced_parameters(model):
        nn.init.normal_(parameter, std=0.3)


def with_dense_weights(model: nn.Module, base: nn.Module, report: Any) -> tuple[Any, Any]:
    """Return the base's weights plus the updates, from the equation, and the updates' leaves."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in surgery.spliced_parameters(model)}
    weights = {}
    for i in report.inserted:
        port = i.site.port(i.edit.port)
        a = leaves.get(f"{i.path}.a", leaves.get(f"{i.path}.a.weight"))
        a = a if i.site.kind == "experts" else a.flatten(1)
        change = 2.0 * torch.einsum("...ri,...ro->...io", a, leaves[f"{i.path}.b"])
        weight = base.get_parameter(port.weight).detach()
        change = change.mT if port.transposed else change
        weights[port.weight] = weight + change.reshape(weight.shape)
    return weights, leaves


def agrees_with_dense_weights(model: nn.Module, base: nn.Module, report: Any, run: Any) -> None:
    """Outputs and gradients are those of the base with W + s A B in place of W."""
    weights, leaves = with_dense_weights(model, base, report)
    expected = run(lambda *a, **k: torch.func.functional_call(base, weights, a, k))
    found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    model.zero_grad()
    found.square().sum().backward()
    for (name, parameter), grad in zip(surgery.spliced_parameters(model), grads, strict=True):
        torch.testing.assert_close(
            parameter.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name
        )


def lives(model: Any, base: Any, run: Any, tmp_path: Path, example: Any = None) -> None:
    """Save, load, merge, undo, disable and remove: to the bits, a merge to rounding."""
    tuned, plain = run(model), run(base)
    assert not torch.equal(tuned, plain)
    surgery.save(model, tmp_path)
    again = surgery.load(copy.deepcopy(base), tmp_path, example_inputs=example)
    assert torch.equal(run(again), tuned)
    merged = surgery.merge(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(run(again), tuned, rtol=1e-5, atol=1e-5)
    merged.undo(again)
    assert torch.equal(run(again), plain)
    with surgery.disabled(model):
        assert torch.equal(run(model), plain)
    surgery.remove(model)
    assert torch.equal(run(model), plain)
    pairs = zip(model.state_dict().items(), base.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def text(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def is_as_dense_weights_are(model: Any, base: Any, report: Any, folder: Path) -> None:
    assert torch.equal(text(model), text(base))
    surgery.freeze_base(model)
    randomised(model)
    agrees_with_dense_weights(model, base, report, text)
    lives(model, base, text, folder)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.few(6)
def test_experts(name: str, how: str, tmp_path: Path) -> None:
    model, base = moe(name, how), moe(name, how)
    report = surgery.splice(model, lora("all"), at=surgery.locate(model).experts)
    is_as_dense_weights_are(model, base, report, tmp_path)


def test_experts_without_a_token_get_a_gradient_of_zero_and_stay() -> None:
    model = moe("mixtral", "grouped_mm")
    surgery.splice(model, lora("all"), at=surgery.locate(model).experts)
    randomised(model)
    chosen: list[Tensor] = []
    block = model.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda module, given: chosen.append(given[1]))
    model(input_ids=IDS[:1, :2]).logits.square().sum().backward()
    met = set(chosen[0].flatten().tolist())
    assert 0 < len(met) < 6
    for update in (block.experts.lora_up, block.experts.lora_output):
        for expert in range(6):
            assert bool(update.b.grad[expert].any()) == (expert in met)
            assert bool(update.a.grad[expert].any()) == (expert in met)


def test_experts_count_and_compute_as_in_peft() -> None:
    model = moe("mixtral", "grouped_mm")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_parameters=names, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    report = surgery.splice(model, lora("all"), at=surgery.locate(model).experts)
    tensors = {n: p for n, p in theirs.named_parameters() if "lora" in n}
    assert sum(i.parameters for i in report.inserted) == sum(p.numel() for p in tensors.values())
    with torch.no_grad():
        for i in report.inserted:
            update, port = model.get_submodule(i.path), i.site.port(i.edit.port)
            layer = f"layers.{i.site.layer}."
            a, b = (next(t for n, t in tensors.items() if layer in n and f"lora_{x}" in n
                         and t.numel() == own.numel())
                    for x, own in (("A", update.a), ("B", update.b)))  # fmt: skip
            update.a.copy_(a.reshape(6, 3, port.in_width))
            update.b.copy_(b.reshape(port.width, 3, 6).permute(2, 1, 0))
        torch.testing.assert_close(text(model), text(theirs), rtol=0, atol=1e-5)


def test_two_adapters_share_the_experts(tmp_path: Path) -> None:
    model, base = moe("mixtral", "grouped_mm"), moe("mixtral", "grouped_mm")
    for name in ("one", "two"):
        surgery.splice(model, lora("all"), at=surgery.locate(model).experts, name=name)
    randomised(model)
    both = text(model)
    surgery.merge(model, "one")
    torch.testing.assert_close(text(model), both, rtol=1e-5, atol=1e-5)
    surgery.merge(model, "two")
    torch.testing.assert_close(text(model), both, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_experts_in_half_precision_train_in_float32() -> None:
    model = moe("mixtral", "grouped_mm").bfloat16()
    base = text(model)
    surgery.splice(model, lora("all"), at=surgery.locate(model).experts)
    assert torch.equal(text(model), base)
    assert {p.dtype for _, p in surgery.spliced_parameters(model)} == {torch.float32}
    text(model).float().square().sum().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))


@pytest.mark.slow
def test_experts_compile_to_one_graph() -> None:
    model = moe("mixtral", "grouped_mm")
    surgery.splice(model, lora("all"), at=surgery.locate(model).experts)
    randomised(model)
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits, backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(IDS), text(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(text(model), text(model))


@pytest.mark.slow
def test_experts_and_rows_are_exported_and_loaded_again(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = moe("mixtral", "grouped_mm")
            sites = surgery.locate(self.model)
            surgery.splice(self.model, lora("up", "rows"), at=sites.experts + sites.embedding)
            randomised(self.model)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.model(ids, use_cache=False).logits
            return out

    wrapped, file = Logits(), tmp_path / "model.pt2"
    sizes = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    torch.export.save(torch.export.export(wrapped, (IDS,), dynamic_shapes=(sizes,)), file)
    loaded = torch.export.load(file).module()
    for ids in (IDS, IDS[:1, :5]):
        torch.testing.assert_close(loaded(ids), wrapped(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "experts"])
@pytest.mark.parametrize("option", [{"bias": True}, {"dropout": 0.1}])
def test_what_has_no_meaning_there_is_refused(kind: str, option: dict[str, Any]) -> None:
    model = moe("mixtral", "eager")
    with pytest.raises(surgery.MethodError, match=f"not possible.*sites of kind '{kind}'"):
        surgery.splice(model, lora("all", **option), at=getattr(surgery.locate(model), kind))


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_rows_of_an_embedding(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        return gemma() if name == "gemma" else build(name).eval()

    model, base = make(), make()
    head = {"gemma": "lm_head", "gpt2": "lm_head"}.get(name)
    if head:  # untied, so that it can be merged
        for each in (model, base):
            each.lm_head.weight = nn.Parameter(each.lm_head.weight.detach().clone())
            each.config.tie_word_embeddings = False
    report = surgery.splice(model, lora("rows"), at=surgery.locate(model).embedding)
    is_as_dense_weights_are(model, base, report, tmp_path)


def test_rows_are_named_beside_the_projections_of_attention() -> None:
    model = build("llama")
    sites = surgery.locate(model)
    report = surgery.splice(model, lora("query", "rows"), at=sites + sites.embedding)
    assert [i.edit.port for i in report.inserted] == ["query", "query", "rows"]
    surgery.remove(model)
    assert {i.edit.port for i in surgery.splice(model, lora("all")).inserted} == {
        "query", "key", "value", "output", "up", "gate"}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_rows_count_and_compute_as_in_peft(name: str) -> None:
    model = gemma() if name == "gemma" else build(name).eval()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens"],
                             init_lora_weights=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    report = surgery.splice(model, lora("rows"), at=surgery.locate(model).embedding)
    tensors = [p for n, p in theirs.named_parameters() if "lora" in n]
    assert report.inserted[0].parameters == sum(p.numel() for p in tensors)
    update = model.get_submodule(report.inserted[0].path)
    with torch.no_grad():
        update.a.copy_(tensors[0])
        update.b.copy_(tensors[1].T)
        torch.testing.assert_close(text(model), text(theirs), rtol=0, atol=1e-5)


def test_the_padding_row_of_an_embedding_learns_nothing() -> None:
    model = gemma()
    surgery.splice(model, lora("rows"), at=surgery.locate(model).embedding)
    model(input_ids=torch.tensor([[0, 5, 6]])).logits.square().sum().backward()
    grad = model.model.embed_tokens.lora_rows.a.grad
    assert not grad[:, 0].any()
    assert grad[:, 5].any()


@pytest.mark.parametrize("tied", [False, True])
def test_a_head(tied: bool, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return tr.LlamaForCausalLM(
            tr.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)
        ).eval()

    model, base = make(), make()
    report = surgery.splice(model, lora("output"), at=surgery.locate(model).linear)
    assert torch.equal(text(model), text(base))
    surgery.freeze_base(model)
    randomised(model)
    hidden = base.model(input_ids=IDS).last_hidden_state
    update = model.get_submodule(report.inserted[0].path)
    expected = text(base) + 2.0 * hidden @ update.a.T @ update.b
    torch.testing.assert_close(text(model), expected, rtol=1e-5, atol=1e-5)
    if not tied:
        lives(model, base, text, tmp_path)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, tmp_path: Path) -> None:
    model, x = pictures(kind)
    base = copy.deepcopy(model)
    sites = surgery.locate(model, x).convolution
    report = surgery.splice(model, lora("output"), at=sites)
    assert [i.path for i in report.inserted] == ["first.lora_output"]
    assert torch.equal(model(x), base(x))
    surgery.freeze_base(model)
    randomised(model)
    agrees_with_dense_weights(model, base, report, lambda run: run(x))
    lives(model, base, lambda run: run(x), tmp_path, x)


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "patches"])
def test_convolutions_count_and_compute_as_in_peft(kind: str) -> None:
    model, x = pictures(kind)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["first"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    report = surgery.splice(model, lora("output"), at=surgery.locate(model, x).convolution)
    tensors = [p for n, p in theirs.named_parameters() if "lora" in n]
    assert report.inserted[0].parameters == sum(p.numel() for p in tensors)
    update: Any = model.get_submodule(report.inserted[0].path)
    with torch.no_grad():
        update.a.weight.copy_(tensors[0])
        update.b.copy_(tensors[1].flatten(1).T)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)


def test_an_update_across_groups_reads_all_channels_and_is_not_merged(tmp_path: Path) -> None:
    model, x = pictures("groups")
    base = copy.deepcopy(model)
    sites = surgery.locate(model, x).convolution
    with pytest.raises(surgery.MethodError, match=r"2 groups.*must divide the rank"):
        surgery.splice(model, lora("output", across_groups=True), at=sites)
    across = surgery.method("lora", rank=4, alpha=8.0, ports=("output",), across_groups=True)
    report = surgery.splice(model, across, at=sites)
    assert torch.equal(model(x), base(x))
    randomised(model)
    update: Any = model.get_submodule(report.inserted[0].path)
    hidden = F.conv2d(x, update.a.weight, padding=1).chunk(2, 1)
    halves = zip(hidden, update.b.chunk(2, 1), strict=True)
    change = torch.cat([torch.einsum("bchw,co->bohw", h, b) for h, b in halves], 1)
    torch.testing.assert_close(model.first(x), base.first(x) + 2.0 * change, rtol=0, atol=1e-5)
    surgery.save(model, tmp_path)
    again = surgery.load(copy.deepcopy(base), tmp_path, example_inputs=x)
    assert torch.equal(again(x), model(x))
    with pytest.raises(surgery.SpliceError, match="LowRankAcrossGroups has no fold"):
        surgery.merge(model)


@pytest.mark.parametrize("option", [{"bias": True}, {"dropout": 0.5}, {"across_groups": True}])
def test_a_convolution_has_every_option(option: dict[str, Any]) -> None:
    model, x = pictures("2d")
    base = model(x)
    surgery.splice(model, lora("output", **option), at=surgery.locate(model, x).convolution)
    assert torch.equal(model(x), base)
    randomised(model)
    model.train()
    assert torch.equal(model(x), model(x)) == ("dropout" not in option)
    model.eval()
    tuned = model(x)
    surgery.merge(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-5)


class Standardised(nn.Conv2d):
    """A convolution whose weight is normalised as it runs: not x * W."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=1)


@pytest.mark.parametrize("module", [
    Standardised(4, 6, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
])  # fmt: skip
def test_a_convolution_that_computes_its_weight_is_no_site(module: nn.Module) -> None:
    x = torch.randn(2, 4, 5, 5)
    assert not len(surgery.locate(Pictures(module).eval(), x).convolution)


def test_convolutions_of_a_speech_model_stand_beside_its_attention() -> None:
    torch.manual_seed(0)
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = tr.WhisperConfig(encoder_layers=1, decoder_layers=1, vocab_size=60, pad_token_id=0,
                              decoder_start_token_id=1, max_source_positions=20, **widths, **heads,
                              bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = tr.WhisperForConditionalGeneration(config).eval()
    given = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": IDS[:1]}
    base, sites = logits(model, given), surgery.locate(model, given)
    assert [s.path for s in sites.convolution] == ["model.encoder.conv1", "model.encoder.conv2"]
    report = surgery.splice(model, lora("output"), at=sites + sites.convolution)
    assert {i.site.kind for i in report.inserted} == {"attention", "ffn", "convolution"}
    assert torch.equal(logits(model, given), base)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_several_adapters_update_one_stack(name: str, how: str) -> None:
    model = moe(name, how)
    method = surgery.method("lora", rank=2, ports=("all",))
    with torch.no_grad():
        for adapter in "ab":
            before = model(IDS).logits
            surgery.splice(model, method, at=surgery.locate(model).experts, name=adapter)
            assert torch.equal(model(IDS).logits, before), "a fresh one moves no bit of the other"
            moved = [p for n, p in surgery.spliced_parameters(model) if f"_{adapter}_" in n]
            for parameter in moved or [p for _, p in surgery.spliced_parameters(model)]:
                parameter.add_(0.1 * torch.randn_like(parameter))
        both = model(IDS).logits
        alone = {}
        for adapter in "ab":
            with surgery.using(model, adapter):
                alone[adapter] = model(IDS).logits
        assert not torch.allclose(alone["a"], alone["b"])
        assert not torch.allclose(both, alone["a"])
        surgery.merge(model)
        torch.testing.assert_close(model(IDS).logits, both, rtol=1e-4, atol=1e-5)
