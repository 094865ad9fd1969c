"""Tiny random models: six architectures that differ in how attention is laid out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

VOCABULARY = 60
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NAMES = ("gpt2", "roberta", "bert", "llama", "vit", "plain")
TEXT = tuple(n for n in NAMES if n != "vit")
GENERATORS = ("gpt2", "llama")


class PlainBlock(nn.Module):
    """A block in nanoGPT's manner, everything in one forward, pre- or post-norm."""

    def __init__(self, width: int, heads: int, prenorm: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.prenorm, self.fused = heads, prenorm, fused
        self.alpha, self.beta = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def mix(self, x: Tensor) -> Tensor:
        B, n, D = x.shape
        q, k, v = self.inward(x).split(D, dim=2)
        q, k, v = (t.view(B, n, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
            scores = scores.masked_fill(
                torch.ones(n, n, device=x.device).tril()[None, None] == 0, float("-inf")
            )
            y = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.drop(self.outward(y.transpose(1, 2).contiguous().view(B, n, D)))

    def think(self, x: Tensor) -> Tensor:
        return self.drop(self.narrow(F.gelu(self.wide(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.prenorm:
            x = x + self.mix(self.alpha(x))
            return x + self.think(self.beta(x))
        x = self.alpha(x + self.mix(x))
        return self.beta(x + self.think(x))


class PlainDecoder(nn.Module):
    """A decoder that knows nothing of transformers."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        depth: int = 2,
        prenorm: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.stack = nn.ModuleList([PlainBlock(width, heads, prenorm, fused) for _ in range(depth)])
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.size(1)))
        for block in self.stack:
            x = block(x)
        return self.head(self.last(x))


def build(
    name: str,
    head_width: int = 8,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 2,
    prenorm: bool = True,
    seed: int = 0,
) -> Any:
    """A tiny random model in evaluation mode."""
    torch.manual_seed(seed)
    width = head_width * heads
    shared = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "vocab_size": VOCABULARY,
        **IDS,
    }
    if name == "plain":
        return PlainDecoder(width, heads, depth, prenorm, fused=depth % 2 == 0).eval()
    if name == "gpt2":
        config = tr.GPT2Config(
            n_embd=width, n_layer=depth, n_head=heads, n_positions=64, vocab_size=VOCABULARY, **IDS
        )
        return tr.GPT2LMHeadModel(config).eval()
    if name == "llama":
        config = tr.LlamaConfig(num_key_value_heads=kv_heads, **shared)
        return tr.LlamaForCausalLM(config).eval()
    if name == "roberta":
        return tr.RobertaForSequenceClassification(
            tr.RobertaConfig(max_position_embeddings=66, **shared)
        ).eval()
    if name == "bert":
        return tr.BertForMaskedLM(tr.BertConfig(**shared)).eval()
    vit = {k: v for k, v in shared.items() if k not in ("vocab_size", *IDS)}
    return tr.ViTForImageClassification(tr.ViTConfig(image_size=8, patch_size=4, **vit)).eval()


def inputs(name: str, batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for a model of ``build``."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def logits(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The logits of a model, whatever it wraps them in."""
    out = model(**given)
    return out if isinstance(out, Tensor) else out[0]


def perturb(model: nn.Module, scale: float = 0.1, seed: int = 3) -> None:
    """Move every inserted parameter off its start."""
    import surgery

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * scale).to(parameter.dtype))


def gpt2_small(**options: Any) -> Any:
    """The real shape, as in the papers' parameter counts; build it on the meta device."""
    return tr.GPT2LMHeadModel(tr.GPT2Config(**options))


def roberta_base() -> Any:
    """The real shape, with pooler; build it on the meta device."""
    return tr.RobertaModel(tr.RobertaConfig(vocab_size=50265, type_vocab_size=1))


def qwen_half_billion() -> Any:
    """The real shape of a model with grouped heads; build it on the meta device."""
    config = tr.Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    config.update({"num_attention_heads": 14, "num_key_value_heads": 2})
    return tr.Qwen2ForCausalLM(config)


def checkpointing(model: Any, reentrant: bool = False) -> None:
    """Recompute activations in the backward; transformers has renamed the way to say so."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def rename(model: nn.Module) -> dict[str, str]:
    """Give every submodule another name; parents find their children under both.

    Returns the new path of each old one.
    """
    old = {id(m): p for p, m in model.named_modules()}
    for number, module in enumerate(list(model.modules())):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        children = dict(module._modules)
        module._modules.clear()
        for index, (name, child) in enumerate(children.items()):
            module._modules[f"m{number}x{index}"] = child
            vars(module)[name] = child
    return {old[id(m)]: p for p, m in model.named_modules()}


def watched(module: nn.Module) -> dict[str, Any]:
    """What ``module`` is given (x) and gives (y) in its next forward, filled in then."""
    met: dict[str, Any] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        met.update(x=(*args, kwargs.get("hidden_states"))[0].detach(), y=output[0])

    module.register_forward_hook(hook, with_kwargs=True)
    return met


def losses_of_training(model: Any, ids: Tensor, rate: float, steps: int = 60) -> list[float]:
    """Train what requires gradient to predict ``ids``, with Adam; the loss of each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of_imitation(name: str, method: Any, rate: float, steps: int = 100) -> list[float]:
    """Train a method to give what the same method gives with other, random parameters."""
    import surgery

    case, models = inputs(name, batch=4), []
    for _ in range(2):
        model = build(name)
        surgery.splice(model, method, example_inputs=case)
        surgery.freeze_base(model, fresh=False)
        models.append(model)
    student, teacher = models
    perturb(teacher, 0.3)
    with torch.no_grad():
        wanted = logits(teacher, case)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = (logits(student, case) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
