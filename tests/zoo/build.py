"""A zoo: a tiny random model for every model type that transformers lists, made generically.

    tiny = build("llama")
    tiny.model(**tiny.inputs)

Nothing is written down per architecture: a default config is shrunk by the *names* of its fields,
inputs are made by the names of ``forward``'s parameters, and the first combination of class,
shrinkage and inputs that runs is the model.

    python -m tests.zoo.build --build-only [types...]   # which types can be built
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.feed import feeds
from tests.zoo.shrink import SHRINKS, Shrink, small_config

MOST_PARAMETERS = 60_000_000
TASKS = [
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "TIME_SERIES_PREDICTION",
]
# The last resort: what a default config of a composite lacks, given as sub-config -> model type.
PARTS = {
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "gpt2"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "bert"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
}


class CannotBuild(Exception):
    """No combination of class, shrinkage and inputs ran; the message is the first reason."""


@dataclass(frozen=True)
class Tiny:
    """A tiny model that ran on ``inputs``: ``make(n)`` gives inputs for another batch size."""

    model: nn.Module
    inputs: dict[str, Any]
    task: str
    make: Callable[[int], dict[str, Any]]


def model_types() -> list[str]:
    """Every model type of transformers that an Auto class can build."""
    return [t for t in _configs() if _class_names(t)]


def build(model_type: str) -> Tiny:
    """A tiny model of this type in evaluation mode that has run once on its inputs.

    Raises:
        CannotBuild: nothing that was tried runs.
    """
    reason: BaseException | None = None
    names = _class_names(model_type)
    for shrink in SHRINKS:
        for name in names:
            torch.manual_seed(0)
            try:
                return _try(model_type, name, shrink)
            except Exception as error:
                reason = reason or error
    raise CannotBuild(f"{type(reason).__name__}: {str(reason)[:300]}") from reason


def _try(model_type: str, class_name: str, shrink: Shrink) -> Tiny:
    import transformers

    # Only losses need scipy; a model that has one in it is built all the same.
    transformers.utils.import_utils.BACKENDS_MAPPING["scipy"] = (lambda: True, "")
    config = small_config(_default(model_type), shrink)
    cls = getattr(transformers, class_name)
    if not isinstance(config, cls.config_class) and cls.config_class is type(
        config.get_text_config()
    ):
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"{class_name}: {size:,} parameters")
    model: nn.Module = cls._from_config(config)
    model.eval()
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = 1
    with torch.no_grad():  # gates that start at zero would hide whole branches
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.1)
    reason: BaseException | None = None
    for make in feeds(model):
        try:
            inputs = make(2)
            torch.manual_seed(0)
            with torch.no_grad():
                output = model(**inputs)
            if not any(t.is_floating_point() for t in tensors(output)):
                raise CannotBuild("the output has no tensor")
            with torch.no_grad():
                model(**make(1))
        except Exception as error:
            reason = reason or error
            continue
        return Tiny(model, inputs, class_name, make)
    raise CannotBuild(f"{class_name}: {type(reason).__name__}: {reason}") from reason


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors nested in an output, caches included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for item in output.values():
            yield from tensors(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


# -- classes and configs -----------------------------------------------------------------------


def _configs() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def _class_names(model_type: str) -> list[str]:
    """The classes to try for a type: the first three tasks that it has, then the base model."""
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for task in TASKS:
        found += _names(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"), model_type)
    found = list(dict.fromkeys(found))[:3] + _names(modeling_auto.MODEL_MAPPING_NAMES, model_type)
    for table, mapping in vars(modeling_auto).items():
        if not found and re.match("MODEL_.*_MAPPING_NAMES", table) and isinstance(mapping, dict):
            found += _names(mapping, model_type)
    return list(dict.fromkeys(found))


def _names(mapping: Any, model_type: str) -> list[str]:
    name = mapping.get(model_type, ())
    return [name] if isinstance(name, str) else list(name)


def _default(model_type: str) -> Any:
    parts = {k: _configs()[t]() for k, t in PARTS.get(model_type, {}).items()}
    if "decoder" in parts:
        parts["decoder"].is_decoder = parts["decoder"].add_cross_attention = True
    return _configs()[model_type](**parts)


# -- all of them -------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """``--build-only [types...]``: what builds; ``--worker types...``: in this process."""
    types = [a for a in arguments if not a.startswith("--")] or model_types()
    if "--worker" in arguments:
        for model_type in types:
            print(f"{model_type}\t{_attempt(model_type)}", flush=True)
        return
    rows: dict[str, str] = {}
    while todo := [t for t in types if t not in rows]:
        batch = todo[:40]
        command = [sys.executable, "-m", "tests.zoo.build", "--worker", *batch]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        done = dict(line.split("\t", 1) for line in run.stdout.splitlines() if "\t" in line)
        if len(done) < len(batch):  # the worker died on the first one without an answer
            done[batch[len(done)]] = f"the process died ({run.returncode})"
        for model_type, answer in done.items():
            print(f"{model_type:<32} {answer}", flush=True)
        rows |= done
    good = sum(answer.startswith("ok") for answer in rows.values())
    print(f"{good} of {len(rows)} types build")


def _attempt(model_type: str) -> str:
    def stop(*_: Any) -> None:
        raise TimeoutError("30 s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    start = time.perf_counter()
    try:
        tiny = build(model_type)
        what = f"ok  {tiny.task} {' '.join(tiny.inputs)}"
    except BaseException as error:
        what = f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")[:400]
    signal.alarm(0)
    return f"{what}  [{time.perf_counter() - start:.1f} s]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
