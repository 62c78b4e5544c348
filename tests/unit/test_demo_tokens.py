"""Every word of the word-sort demo is one token of the tokenizer that its quick start trains."""

from __future__ import annotations

import pytest
from tests.unit.test_demo_data import SMALL, make_data, user_text
from transformers import PreTrainedTokenizerFast

from hetero_ppo.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    recipe = make_data.Recipe(sft_rows=3000, prompt_rows=SMALL.prompt_rows, preference_rows=SMALL.preference_rows)
    rows = make_data.make_rows(0, recipe)["sft.jsonl"]
    texts = (text for row in rows for message in row["messages"] for text in (message["role"], message["content"]))
    return train_tokenizer(texts, 512, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("word", make_data.WORDS)
def test_one_token_per_word(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    assert len(tokenizer.encode(f" {word}")) == 1


def test_answers_are_as_long_as_their_words(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in make_data.make_rows(1, SMALL)["prompts.jsonl"]:
        prompt = [{"role": "user", "content": user_text(row)}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(row["label"])
        # "Sorted" and ":" come before the words; the same word is the same token in prompt and answer.
        assert len(answer) == 2 + len(row["metadata"]["words"])
        assert set(answer[2:]) <= set(ids)
        assert len(ids) <= 24
