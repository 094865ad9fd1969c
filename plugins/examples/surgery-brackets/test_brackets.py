import pytest
from surgery_brackets import balanced

import surgery


def test_half_of_the_texts_are_balanced_and_the_labels_say_which():
    splits = surgery.task("brackets", length=6, train=20, test=4).splits()
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 20,
        "validation": 4,
        "test": 4,
    }
    for example in splits["train"]:
        assert balanced(example["texts"][0].split()) == bool(example["label"])
    assert sum(example["label"] for example in splits["train"]) == 10


def test_a_length_that_cannot_be_balanced_is_refused():
    with pytest.raises(surgery.RecipeError, match="must be even"):
        surgery.task("brackets", length=5).splits()
