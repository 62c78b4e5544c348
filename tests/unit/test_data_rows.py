"""Rows may hold more than texts: turns that are not learned, tools, labels, and fields that nothing reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl

from hetero_ppo.config.schema import PromptDataConfig
from hetero_ppo.data.collate import collate_sft
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sft import SftExample, load_sft

TOOL_TEMPLATE = (
    "{% for t in tools or [] %}[TOOL {{ t.name }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[CALL {{ c | tojson }}]{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"name": "weather"}]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation(*answers: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [message for answer in answers for message in (turn("user", "hello"), answer)]}


def learned(example: SftExample) -> str:
    """Return the text that the loss mask covers."""
    batch = collate_sft([example])
    return chatml_encoder().tokenizer.decode(batch.token_ids[0, 1:][batch.loss_mask[0]].tolist())


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path: Path, key: dict[str, Any], form: str) -> None:
    rows = [
        conversation(turn("assistant", "apple", **key), turn("assistant", "pear")),
        conversation(turn("assistant", "apple"), turn("assistant", "pear", **key)),
        conversation(turn("assistant", "", **key), turn("assistant", "pear")),
    ]
    if form == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", rows)
    else:
        path = str(tmp_path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    masked_first, masked_last, empty = load_sft(path, data_config(load_sft), chatml_encoder()).examples
    assert [learned(example) for example in (masked_first, masked_last, empty)] == [
        "pear<|im_end|>",
        "apple<|im_end|>",
        "pear<|im_end|>",
    ]
    plain = write_jsonl(tmp_path / "b.jsonl", [conversation(turn("assistant", "apple"), turn("assistant", "pear"))])
    (unmasked,) = load_sft(plain, data_config(load_sft), chatml_encoder()).examples
    assert masked_first.token_ids == masked_last.token_ids == unmasked.token_ids
    assert learned(unmasked) == "apple<|im_end|>pear<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [turn("user", "a"), turn("assistant", "b", weight=0.5)],
            r"messages\[1\]\.weight'.*is 0.5; a turn is in the loss",
        ),
        ([turn("user", "a"), turn("assistant", "b", train="no")], r"messages\[1\]\.train'.*is no; a turn"),
        (
            [turn("user", "a", train=True), turn("assistant", "b")],
            r"messages\[0\]\.train'.*on assistant messages alone",
        ),
        ([turn("user", "a"), turn("assistant", "b", weight=1, train=False)], "weight 1 and train False contradict"),
        ([turn("user", "a"), turn("assistant", "b", weight=0)], "every answer has weight 0"),
        ([turn("user", "a"), turn("assistant", "b", mask=0)], r"messages\[1\]\.mask': is not read"),
    ],
)
def test_what_a_turn_cannot_say(tmp_path: Path, messages: list[dict[str, Any]], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1, .*{message}"):
        load_sft(path, data_config(load_sft), chatml_encoder())


def test_turn_keys_outside_sft_are_refused_by_name(tmp_path: Path) -> None:
    prompt = [turn("user", "a"), turn("assistant", "b", weight=0), turn("user", "c")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": "d", "rejected": "e"}])
    for load in (load_prompts, load_preferences):
        with pytest.raises(ValueError, match=r"line 1, field 'prompt\[1\]\.weight': would not be used"):
            load(path, data_config(load), chatml_encoder())


def test_tools_and_calls_give_the_same_ids_from_jsonl_and_parquet(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": arguments} for arguments in ({"city": "Oslo"}, {"zone": "CET", "day": 1})]
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                turn("user", "w?"),
                {"role": "assistant", "tool_calls": [call]},
                turn("tool", ""),
                turn("assistant", "so"),
            ],
            "tools": TOOLS,
        }
        for call in calls
    ]
    parquet = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    as_text = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), parquet, write_jsonl(tmp_path / "b.jsonl", as_text)]
    encoder = chatml_encoder(TOOL_TEMPLATE)
    one, *others = [load_sft(path, data_config(load_sft), encoder).examples for path in paths]
    text = encoder.tokenizer.decode(one[0].token_ids)
    assert text.startswith("[TOOL weather]") and '[CALL {"name": "f", "arguments": {"city": "Oslo"}}]' in text
    assert all(list(other) == list(one) for other in others)
    asked = write_jsonl(tmp_path / "c.jsonl", [{"prompt": row["messages"][:3], "tools": TOOLS} for row in rows])
    prompts = load_prompts(asked, data_config(load_prompts), encoder).examples
    assert [one[n].token_ids[: one[n].answer_spans[-1][0]] for n in (0, 1)] == [p.prompt_ids for p in prompts]
    assert prompts[0].tools == TOOLS


def test_tools_that_nobody_would_see_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "tools": TOOLS}])
    with pytest.raises(ValueError, match="line 1, field 'completion': the chat template does not read tools"):
        load_sft(path, data_config(load_sft), chatml_encoder())
    for load in (load_sft, load_prompts):
        with pytest.raises(ValueError, match="line 1, field 'tools': tools are written by a chat template"):
            load(path, data_config(load, apply_chat_template=False), chatml_encoder(None))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "tools": ["weather"]}])
    with pytest.raises(ValueError, match="line 1, field 'tools': expected a list of tools"):
        load_prompts(path, data_config(load_prompts), chatml_encoder(TOOL_TEMPLATE))


def test_a_key_may_lie_in_an_object(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reward_model": {"ground_truth": "4"}}, {"prompt": "a", "reward_model.ground_truth": "5"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(path, data_config(load_prompts, label_key="reward_model.ground_truth"), chatml_encoder())
    assert [example.label for example in prompts.examples] == ["4", "5"]


#: Kind of data -> a row, and its column -> the option that names the column.
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "conversation": (
        {"messages": [turn("user", "a"), turn("assistant", "b")], "tools": TOOLS},
        {"messages": "messages_key", "tools": "tools_key"},
    ),
    "completion": (
        {"prompt": "hello", "completion": "there"},
        {"prompt": "prompt_key", "completion": "completion_key"},
    ),
    "pair": (
        {"prompt": "hello", "chosen": "a", "rejected": "b"},
        {"prompt": "prompt_key", "chosen": "chosen_key", "rejected": "rejected_key"},
    ),
    "question": ({"prompt": "hello"}, {"prompt": "prompt_key"}),
    "prompt": (
        {"messages": [turn("user", "hello")], "tools": TOOLS, "label": "4", "metadata": {"level": 2}},
        {"messages": "messages_key", "tools": "tools_key", "label": "label_key", "metadata": "metadata_key"},
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_column_may_have_another_name(kind: str, tmp_path: Path) -> None:
    """The examples are those of the usual names."""
    row, options = COLUMNS[kind]
    load = {"pair": load_preferences, "prompt": load_prompts, "question": load_prompts}.get(kind, load_sft)

    def examples(name: str, row: dict[str, Any], **changes: str) -> list[Any]:
        return list(
            load(
                write_jsonl(tmp_path / name, [row]), data_config(load, **changes), chatml_encoder(TOOL_TEMPLATE)
            ).examples
        )

    usual = examples("usual.jsonl", row)
    for column, option in options.items():
        renamed = {f"my_{name}" if name == column else name: value for name, value in row.items()}
        assert examples("renamed.jsonl", renamed, **{option: f"my_{column}"}) == usual, option


@pytest.mark.parametrize("kind", ["completion", "pair"])
def test_a_sequence_may_be_so_long(kind: str, tmp_path: Path) -> None:
    load = load_preferences if kind == "pair" else load_sft
    path = write_jsonl(tmp_path / "a.jsonl", [COLUMNS[kind][0]])
    (example,) = load(path, data_config(load), chatml_encoder()).examples
    load(path, data_config(load, max_sequence_tokens=example.num_tokens), chatml_encoder())
    with pytest.raises(ValueError, match=f"data.max_sequence_tokens.*{example.num_tokens - 1}"):
        load(path, data_config(load, max_sequence_tokens=example.num_tokens - 1), chatml_encoder())


@pytest.mark.parametrize("changes", [{"label_key": "gold"}, {"metadata_key": "info"}, {"messages_key": "chat"}])
def test_a_key_that_no_row_has_is_an_error(tmp_path: Path, changes: dict[str, str]) -> None:
    (option, name), rows = next(iter(changes.items())), [{"prompt": "a", "answer": "4", "extra": {"gold": 1}}] * 2
    message = rf"a\.jsonl: data\.{option}={name}: none of the 2 rows .* rows have: answer, extra, extra\.gold, prompt"
    with pytest.raises(ValueError, match=message):
        load_prompts(write_jsonl(tmp_path / "a.jsonl", rows), data_config(load_prompts, **changes), chatml_encoder())


def notes(path: str, data: PromptDataConfig) -> list[str]:
    report = load_prompts(path, data, chatml_encoder()).report
    assert report.describe().splitlines()[1:] == list(report.notes)
    return [note.removeprefix(f"{path}: ") for note in report.notes]


def test_what_a_file_lacks_and_what_is_not_read_is_printed(tmp_path: Path) -> None:
    prompt = [turn("user", "a", name="x"), turn("assistant", "b", reasoning="c"), turn("user", "c")]
    rows = [{"prompt": prompt, "label": 4, "source": "web"}, {"prompt": "b", "label": "4"}, {"prompt": "c", "id": 3}]
    assert notes(write_jsonl(tmp_path / "a.jsonl", rows), data_config(load_prompts)) == [
        "label 'label' (data.label_key): 1 of 3 rows have none; functions get None for these",
        "label 'label' (data.label_key): of several types: int in 1 rows, str in 1 rows",
        "fields that are not read: id, source",
        "keys of messages that the chat template does not read: reasoning",
    ]
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "b", "answer": "4"}])
    assert (
        notes(path, data_config(load_prompts))[0]
        == "label 'label' (data.label_key): no row has one; functions get None"
    )
    assert notes(path, data_config(load_prompts, label_key="answer")) == []
