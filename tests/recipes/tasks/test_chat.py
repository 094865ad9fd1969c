"""Conversations are written by the chat template, and only answers are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tr

import surgery
from surgery.errors import RecipeError
from tests.recipes import tiny

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def write(folder: Path, rows: list[Any]) -> str:
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "talks.jsonl")


def chat(folder: Path, rows: list[Any] | None = None, **options: Any) -> surgery.Task:
    path = write(folder, rows or [{"messages": TALK}] * 10)
    return surgery.task("chat", path=path, **{"chat_template": "chatml", **options})


@pytest.fixture
def tokenizer(root: Path) -> Any:
    model, _ = tiny.prepared("webnlg", root)
    made = tr.AutoTokenizer.from_pretrained(model)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def learnt(features: dict[str, Any], tokenizer: Any) -> str:
    pairs = list(zip(features["input_ids"], features["labels"], strict=True))
    assert all(y in (-100, x) for x, y in pairs)
    return str(tokenizer.decode([x for x, y in pairs if y != -100]))


def test_the_last_answer_is_learnt_after_the_prompt_that_is_asked(
    tmp_path: Path, tokenizer: Any
) -> None:
    task = chat(tmp_path, system="Be brief.")
    example = task.splits()["train"][0]
    features = task.encode(example, tokenizer)
    assert tokenizer.decode(features["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert learnt(features, tokenizer) == "2<|im_end|>\n"
    ids = task.prompt(example, tokenizer)["input_ids"]
    assert tokenizer.decode(ids).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    assert features["input_ids"][: len(ids)] == ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in task.stop(tokenizer)
    assert task.references(example) == ["2"]


def test_each_answer_is_learnt_and_two_columns_are_a_conversation(
    tmp_path: Path, tokenizer: Any
) -> None:
    task = chat(tmp_path, every_answer=True)
    found = [learnt(task.encode(e, tokenizer), tokenizer) for e in task.splits()["train"][:2]]
    assert found == ["Hello.<|im_end|>\n", "2<|im_end|>\n"]
    rows = [{"q": "One?", "a": "1"}] * 10
    example = chat(tmp_path, rows, user="q", assistant="a").splits()["train"][0]
    assert example["messages"] == [{"role": "user", "content": "One?"}]
    assert example["references"] == ["1"]


def test_a_long_conversation_loses_its_beginning(tmp_path: Path, tokenizer: Any) -> None:
    task = chat(tmp_path, max_length=6)
    example = task.splits()["train"][0]
    features = task.encode(example, tokenizer)
    assert len(features["input_ids"]) == len(features["labels"]) == 6
    assert learnt(features, tokenizer) == "2<|im_end|>\n"
    assert len(task.prompt(example, tokenizer)["input_ids"]) == 6


@pytest.mark.cases
@pytest.mark.filterwarnings("ignore")
def test_the_tokens_are_those_that_trl_makes_of_the_conversation(
    tmp_path: Path, tokenizer: Any
) -> None:
    """TRL's own preparation of a prompt and its completion, with its completion-only loss."""
    import trl
    from datasets import Dataset

    from surgery_recipes.tasks.chat import CHATML
    from tests.support.models import build

    task = chat(tmp_path)
    tokenizer.chat_template = CHATML
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    rows = Dataset.from_list([{"prompt": TALK[:-1], "completion": TALK[-1:]}])
    config = trl.SFTConfig(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    ours = task.encode(task.splits()["train"][0], tokenizer)
    [theirs] = list(trainer.train_dataset)
    assert theirs["input_ids"] == ours["input_ids"]
    assert theirs["labels"] == ours["labels"]


@pytest.mark.parametrize(
    ("row", "options", "part"),
    [
        ({"messages": TALK[:3]}, {}, "row 1: a conversation must end with an answer"),
        ({"messages": TALK[1:2]}, {}, "must end with an answer of the assistant to something"),
        ({"messages": []}, {}, r"row 1: \[\] is no conversation"),
        ({"messages": "Hi"}, {}, "row 1: 'Hi' is no conversation"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, {}, "message 1: .* no role and content"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, {}, "role 'bot' must be one of system"),
        ({"messages": [{"role": "user", "content": " "}]}, {}, "row 1: message 1: an empty text"),
        ({"massages": TALK}, {}, r"no column 'messages'. Did you mean 'massages'\?"),
        ({"messages": TALK}, {"user": "q"}, "Give both or neither"),
        ({"messages": TALK}, {"user": "q", "assistant": "a"}, "no column 'q'.*Set data.user"),
        ({"messages": TALK}, {"chat_template": "llama"}, "must be chatml"),
        ({"messages": TALK}, {"metrics": ["chr"]}, "no metric 'chr'. Did you mean 'chrf'"),
    ],
)
def test_a_mistake_is_named(row: Any, options: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=part):
        chat(tmp_path, [row] * 10, **options).splits()


def test_a_tokenizer_without_a_template_or_with_one_that_refuses(
    tmp_path: Path, tokenizer: Any
) -> None:
    task = chat(tmp_path, chat_template="")
    example = task.splits()["train"][0]
    with pytest.raises(RecipeError, match=r"has no chat template.*data.chat_template=chatml"):
        task.encode(example, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(RecipeError, match=r"l: row \d+: the chat template refuses .*no s"):
        task.encode(example, tokenizer)
