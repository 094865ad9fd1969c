"""Chat: answer as the assistant of a conversation, written by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, RecipeError
from surgery_recipes.recipe_files import reason, shown
from surgery_recipes.tasks.generate import AnyTexts
from surgery_recipes.tasks.generation import IGNORED, not_empty

ROLES = ("system", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Chat(AnyTexts):
    """The last answer of a conversation, after everything before it. Only the answer is learnt.

    The tokens are those of the tokenizer's chat template. What the template writes of the whole
    conversation beyond what it writes of the prompt counts in the loss, the end of the turn too.

    Attributes:
        messages: the column of the conversation, a list of ``role`` and ``content``, which ends
            with the assistant's answer.
        user, assistant: two columns of texts in place of ``messages``: question and answer.
        system: a system message for conversations without one.
        every_answer: learn each answer of the assistant, after what comes before it, not only the
            last.
        chat_template: ``chatml`` for a tokenizer without a template; "" takes the tokenizer's.
        max_length: the most tokens of a conversation to learn, and of a prompt; longer ones lose
            their beginning. 0 is no limit.
    """

    name: ClassVar[str] = "chat"

    messages: str = "messages"
    user: str = ""
    assistant: str = ""
    system: str = ""
    every_answer: bool = False
    chat_template: str = ""
    max_length: int = 1024
    metrics: Sequence[str] = ("chrf",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.user) != bool(self.assistant):
            raise RecipeError(
                "task 'chat': user and assistant are two columns. Give both or neither."
            )
        if self.chat_template not in ("", "chatml"):
            raise RecipeError(
                f"data.chat_template={shown(self.chat_template)} must be chatml, or left out for "
                "the tokenizer's own."
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        return ("<|im_start|>", "<|im_end|>") if self.chat_template else ()

    def splits(self) -> dict[str, list[Example]]:
        tables = self.tables()
        for table in tables.values():
            if self.user:
                table.require([self.user], "user")
                table.require([self.assistant], "assistant")
            else:
                table.require([self.messages], "messages")
        return {
            split: [
                example
                for where, row in table
                for example in self._examples(self._conversation(row, where), where)
            ]
            for split, table in tables.items()
        }

    def _conversation(self, row: dict[str, Any], where: str) -> list[dict[str, str]]:
        """The messages of a row, checked."""
        given: Any = row.get(self.messages)
        if self.user:
            given = [
                {"role": "user", "content": row.get(self.user)},
                {"role": "assistant", "content": row.get(self.assistant)},
            ]
        if not isinstance(given, list) or not given:
            raise RecipeError(
                f"{where}: {shown(given)} is no conversation. Column {self.messages!r} must be a "
                "list of messages with role and content."
            )
        found = []
        for number, message in enumerate(given, start=1):
            place = f"{where}: message {number}"
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise RecipeError(f"{place}: {shown(message)} has no role and content.")
            if message["role"] not in ROLES:
                raise RecipeError(
                    f"{place}: role {shown(message['role'])} must be one of {', '.join(ROLES)}."
                )
            content = not_empty(message["content"], place)
            found.append({"role": message["role"], "content": content})
        if self.system and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self.system})
        if found[-1]["role"] != "assistant" or len(found) < 2:
            raise RecipeError(
                f"{where}: a conversation must end with an answer of the assistant to something. "
                "Remove what follows it, or the row."
            )
        return found

    def _examples(self, messages: list[dict[str, str]], where: str) -> list[Example]:
        """An example for each answer to learn: ``messages`` before it, and its text."""
        ends = [
            i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0
        ] if self.every_answer else [len(messages) - 1]  # fmt: skip
        return [
            {"messages": messages[:i], "references": [messages[i]["content"]], "where": where}
            for i in ends
        ]

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        return {"input_ids": self._cut(self._prompt(example, tokenizer))}

    def encode(self, example: Example, tokenizer: Any) -> Features:
        before = self._prompt(example, tokenizer)
        answer = {"role": "assistant", "content": example["references"][0]}
        whole = self._written([*example["messages"], answer], tokenizer, example, False)
        pairs = zip(before, whole, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))
        labels = [IGNORED] * shared + whole[shared:]
        return {"input_ids": self._cut(whole), "labels": self._cut(labels)}

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[-self.max_length :] if self.max_length else ids

    def _prompt(self, example: Example, tokenizer: Any) -> list[int]:
        return self._written(list(example["messages"]), tokenizer, example, True)

    def _written(
        self, messages: list[dict[str, str]], tokenizer: Any, example: Example, ask: bool
    ) -> list[int]:
        """The tokens of messages as the chat template writes them.

        Raises:
            RecipeError: there is no template, or it refuses the messages.
        """
        if self.chat_template:
            tokenizer.chat_template = CHATML  # saved with the tokenizer, beside the adapter
        if not tokenizer.chat_template:
            raise RecipeError(
                "task 'chat': the tokenizer of the model has no chat template. Take a model that "
                "was tuned for chats, or set data.chat_template=chatml."
            )
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates are programs that raise what they like
            raise RecipeError(
                f"{example['where']}: the chat template refuses the conversation: {reason(error)}"
            ) from error
        return list(ids)

    def stop(self, tokenizer: Any) -> list[int]:
        """The end token, and the end of a turn in ChatML."""
        ends = [tokenizer.eos_token_id]
        vocabulary = tokenizer.get_vocab()
        return list(dict.fromkeys([*ends, *filter(None, [vocabulary.get("<|im_end|>")])]))

    def source(self, example: Example) -> str:
        return "\n".join(f"{m['role']}: {m['content']}" for m in example["messages"])


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(Chat)
