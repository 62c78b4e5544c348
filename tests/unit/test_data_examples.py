"""SFT, preference and prompt sets: exact token ids, masks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl

from hetero_ppo.config.schema import OverlongPrompts
from hetero_ppo.data.collate import collate_preferences, collate_prompts, collate_sft
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sequence_end import at_sequence_end, last_token_index
from hetero_ppo.data.sft import SftExample, load_sft

TURNS = [
    {"role": "system", "content": "sort"},
    {"role": "user", "content": "pear apple"},
    {"role": "assistant", "content": "apple pear"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
]
PRE_HISTORY_REWRITING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}THINK {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEXT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant he{% endif %}"
)


def marked_text(example: SftExample) -> list[str]:
    """Return the text of every answer span."""
    encoder = chatml_encoder()
    return [encoder.tokenizer.decode(example.token_ids[start:end]) for start, end in example.answer_spans]


def test_multi_turn_loss_is_on_answers_and_their_ends_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    (example,) = load_sft(path, data_config(load_sft), chatml_encoder()).examples
    assert marked_text(example) == ["apple pear<|im_end|>", "hello there<|im_end|>"]
    whole = chatml_encoder().tokenizer.decode(example.token_ids)
    assert whole == chatml_encoder().render(TURNS, add_generation_prompt=False)

    batch = collate_sft([example])
    learned = batch.token_ids[0, 1:][batch.loss_mask[0]].tolist()
    assert chatml_encoder().tokenizer.decode(learned) == "apple pear<|im_end|>hello there<|im_end|>"


def test_what_a_template_writes_after_the_end_of_an_answer_is_not_learned(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    (example,) = load_sft(path, data_config(load_sft), chatml_encoder(template)).examples
    assert marked_text(example) == ["apple pear<|im_end|>", "hello there<|im_end|>"]
    assert example.token_ids[-1] == chatml_encoder().eos_token_id


def test_an_answer_that_the_template_does_not_end_gets_the_end_of_sequence_token(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant:{% endif %}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "hello there"}])
    (example,) = load_sft(path, data_config(load_sft), chatml_encoder(template)).examples
    assert marked_text(example) == [" hello there<|im_end|>"]


def test_prompt_and_completion_in_their_forms_agree(tmp_path: Path) -> None:
    rows = [
        {"prompt": "pear apple", "completion": "apple pear"},
        {
            "prompt": [{"role": "user", "content": "pear apple"}],
            "completion": [{"role": "assistant", "content": "apple pear"}],
        },
        {"messages": [{"role": "user", "content": "pear apple"}, {"role": "assistant", "content": "apple pear"}]},
    ]
    examples = load_sft(write_jsonl(tmp_path / "a.jsonl", rows), data_config(load_sft), chatml_encoder()).examples
    assert examples[0] == examples[1] == examples[2]
    assert marked_text(examples[0]) == ["apple pear<|im_end|>"]


def test_earlier_answers_inside_a_prompt_are_not_learned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": TURNS[:4], "completion": "hello there"}])
    (example,) = load_sft(path, data_config(load_sft), chatml_encoder()).examples
    assert marked_text(example) == ["hello there<|im_end|>"]


def test_without_a_template_ids_are_concatenated(tmp_path: Path) -> None:
    encoder = chatml_encoder(template=None)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "pear ap", "completion": "ple pear"}])
    (example,) = load_sft(path, data_config(load_sft, apply_chat_template=False), encoder).examples
    prompt, answer = encoder.encode(["pear ap", "ple pear"])
    assert example.token_ids == [*prompt, *answer, encoder.eos_token_id]
    assert example.answer_spans == [(len(prompt), len(example.token_ids))]
    (prompt_example,) = load_prompts(path, data_config(load_prompts, apply_chat_template=False), encoder).examples
    assert prompt_example.prompt_ids == prompt


def test_training_and_generation_start_from_the_same_prompt_ids(tmp_path: Path) -> None:
    row = {"prompt": "pear apple", "completion": "apple pear", "chosen": "apple pear", "rejected": "pear"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    (prompt,) = load_prompts(path, data_config(load_prompts), chatml_encoder()).examples
    (sft,) = load_sft(path, data_config(load_sft), chatml_encoder()).examples
    (pair,) = load_preferences(path, data_config(load_preferences), chatml_encoder()).examples
    length = len(prompt.prompt_ids)
    assert sft.token_ids[:length] == pair.chosen_ids[:length] == pair.rejected_ids[:length] == prompt.prompt_ids
    assert sft.answer_spans[0][0] == pair.prompt_length == length
    assert sft.token_ids == pair.chosen_ids


@pytest.mark.parametrize("template", [PRE_HISTORY_REWRITING_TEMPLATE, PLAIN_TEXT_TEMPLATE])
def test_a_template_without_exact_masks_is_an_error(tmp_path: Path, template: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, field 'messages': .*writes earlier turns differently"):
        load_sft(path, data_config(load_sft), chatml_encoder(template))


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "re"}])
    with pytest.raises(ValueError, match="line 1, field 'completion': .*roles user: roles must alternate"):
        load_sft(path, data_config(load_sft), chatml_encoder(template))
    with pytest.raises(ValueError, match="line 1, field 'prompt': .*roles must alternate"):
        load_prompts(path, data_config(load_prompts), chatml_encoder(template))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "field 'messages': is missing; the row has: text"),
        ({"prompt": "a"}, "field 'completion': is missing"),
        ({"messages": TURNS[:4]}, "the last message has to be the assistant's, it is the user's"),
        ({"messages": TURNS[2:]}, "the first message is the assistant's"),
    ],
)
def test_sft_rows_that_cannot_be_used(tmp_path: Path, row: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(ValueError, match=rf"line 2, .*{message}"):
        load_sft(path, data_config(load_sft), chatml_encoder())


def test_preference_forms_agree(tmp_path: Path) -> None:
    user = {"role": "user", "content": "pear apple"}
    good, bad = ({"role": "assistant", "content": text} for text in ("apple pear", "pear"))
    rows = [
        {"prompt": "pear apple", "chosen": "apple pear", "rejected": "pear"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": "pear apple", "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
    ]
    examples = load_preferences(
        write_jsonl(tmp_path / "a.jsonl", rows), data_config(load_preferences), chatml_encoder()
    ).examples
    assert all(example == examples[0] for example in examples)
    batch = collate_preferences(examples[:1])
    assert batch.chosen_ids[0, batch.chosen_lengths[0] - 1] == chatml_encoder().eos_token_id
    assert batch.rejected_lengths.tolist() == [len(examples[0].rejected_ids)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected': is missing"),
        ({"chosen": "b", "rejected": "c"}, "field 'prompt': is missing"),
        (
            {"prompt": "other", "chosen": TURNS[1:3], "rejected": TURNS[1:3]},
            "does not begin with the messages of 'prompt'",
        ),
        ({"chosen": TURNS[1:3], "rejected": TURNS[3:5]}, "shares no prompt"),
        ({"prompt": "hello", "chosen": TURNS[3:4], "rejected": "b"}, "has to begin with an assistant message"),
    ],
)
def test_preference_rows_that_cannot_be_used(tmp_path: Path, row: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load_preferences(path, data_config(load_preferences), chatml_encoder())


def test_same_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    pairs = load_preferences(write_jsonl(tmp_path / "a.jsonl", rows), data_config(load_preferences), chatml_encoder())
    assert len(pairs) == 1
    assert "1 of 2 rows; left out: 1 whose chosen and rejected" in pairs.report.describe()


def test_overlong_prompts_are_an_error_or_dropped_never_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "hello"}, {"prompt": "hello there " * 20, "label": 3}, {"prompt": "pear", "metadata": {"k": 1}}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"1 of 3 rows are longer than data.max_prompt_tokens=30 tokens, .*line 2.*has \d+"
    ):
        load_prompts(path, data_config(load_prompts, max_prompt_tokens=30), chatml_encoder())
    dropping = data_config(load_prompts, max_prompt_tokens=30, overlong_prompts=OverlongPrompts.drop)
    prompts = load_prompts(path, dropping, chatml_encoder())
    assert [example.index for example in prompts.examples] == [0, 2]
    assert prompts.report.num_overlong == 1
    batch = collate_prompts(prompts.examples)
    assert batch.metadata == [{}, {"k": 1}]
    assert batch.labels == [None, None]
    with pytest.raises(ValueError, match="no usable row: .*left out: 3 longer"):
        load_prompts(
            path,
            data_config(load_prompts, max_prompt_tokens=2, overlong_prompts=OverlongPrompts.drop),
            chatml_encoder(),
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "field 'prompt': is empty"),
        ({"prompt": TURNS[:3]}, "the last message is the assistant's"),
        ({"prompt": "a", "metadata": "x"}, "field 'metadata': expected an object, got str"),
        ({"question": "a"}, "field 'prompt': is missing; the row has: question"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, row: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load_prompts(path, data_config(load_prompts), chatml_encoder())


def test_keys_are_configurable_and_messages_can_be_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "hello", "answer": "#### 3"}, {"messages": TURNS[:2]}])
    prompts = load_prompts(path, data_config(load_prompts, prompt_key="question", label_key="answer"), chatml_encoder())
    assert [example.label for example in prompts.examples] == ["#### 3", None]


def test_the_fingerprint_follows_the_token_ids(tmp_path: Path) -> None:
    rows = [{"prompt": "hello"}, {"prompt": "there"}]
    one, same, swapped = (
        load_prompts(write_jsonl(tmp_path / name, content), data_config(load_prompts), chatml_encoder()).fingerprint
        for name, content in (("a.jsonl", rows), ("b.jsonl", rows), ("c.jsonl", rows[::-1]))
    )
    assert one == same != swapped


def test_the_end_of_a_sequence_is_told_by_its_length_alone() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    lengths = torch.tensor([4, 2, 1])
    assert last_token_index(lengths).tolist() == [3, 1, 0]
    assert at_sequence_end(values, lengths).tolist() == [3.0, 5.0, 8.0]
