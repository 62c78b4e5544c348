"""An input of a run keeps its digest when it moves, and not when its content changes; a date in a template is the run's."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl
from safetensors.torch import save_file

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.prompts import labels_digest, load_prompts
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.data.sft import load_sft
from megatron_bridge.weights.weights_digest import model_digest

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {"hidden_size": 8, "architectures": ["A"], "transformers_version": "5"}


def dated(started_at: datetime | None) -> TextEncoder:
    plain = chatml_encoder(DATED)
    return TextEncoder(
        plain.tokenizer, plain.template, plain.prefix_ids, plain.eos_token_id, plain.source, started_at=started_at
    )


def test_a_template_that_prints_the_date_prints_the_day_on_which_the_run_began(tmp_path: Path) -> None:
    """After midnight, and on every rank, the ids are those of the run's begin, so the checkpoint's data is this data."""
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    first = load_sft(path, data_config(load_sft), dated(datetime(2024, 2, 29, 23, 59)))
    assert "Today: 29 Feb 2024" in dated(None).decode(first.examples[0].token_ids)
    assert load_sft(path, data_config(load_sft), dated(datetime(2024, 2, 29, 0, 1))).fingerprint == first.fingerprint
    assert load_sft(path, data_config(load_sft), dated(datetime(2024, 3, 1, 0, 1))).fingerprint != first.fingerprint


def test_labels_and_metadata_are_part_of_the_data(tmp_path: Path) -> None:
    def digests(name: str, **row: object) -> tuple[str, str]:
        path = write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": "hello there", **row}, {"prompt": "hello", "label": None}]
        )
        found = load_prompts(path, data_config(load_prompts), chatml_encoder())
        return found.fingerprint, labels_digest(found.examples)

    plain = digests("a", label="x", metadata={"a": 1, "b": 2})
    assert digests("b", metadata={"b": 2, "a": 1}, label="x") == plain
    for row in ({"label": "y", "metadata": {"a": 1, "b": 2}}, {"label": "x", "metadata": {"a": 1}}, {"label": "x"}):
        ids, labels = digests("c", **row)
        assert ids == plain[0] and labels != plain[1]


def write_model(folder: Path, parts: int = 1, factor: float = 1.0, **config: object) -> Path:
    folder.mkdir()
    tensors = {name: torch.arange(6.0).reshape(2, 3) * factor + place for place, name in enumerate("abcd")}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if parts == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{place % parts}.safetensors" for place, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_weights_keep_their_digest_wherever_they_lie(tmp_path: Path) -> None:
    plain = model_digest(write_model(tmp_path / "a"))
    assert model_digest(write_model(tmp_path / "b", parts=2)) == plain
    assert model_digest(write_model(tmp_path / "c", architectures=["B"], eos_token_id=3)) == plain
    assert model_digest(write_model(tmp_path / "d", factor=1.001)) != plain
    assert model_digest(write_model(tmp_path / "e", rope_theta=10)) != plain


def test_ranks_read_a_model_together(tmp_path: Path) -> None:
    folder, tables = write_model(tmp_path / "a", parts=2), []
    for rank in range(3):
        model_digest(folder, rank, 3, tables.append)
    assert all(int((table != 0).any(dim=1).sum()) in (1, 2) for table in tables)  # each reads a part
    assert model_digest(folder, 0, 3, lambda table: table.add_(tables[1] + tables[2])) == model_digest(folder)


def test_other_data_that_is_allowed_goes_on(tmp_path: Path) -> None:
    """The run continues at the same place, or from the beginning if the rows are others."""

    def sampler(rows: int, fingerprint: str, seed: int = 1) -> ResumableSampler:
        return ResumableSampler(rows, 4, 0, 1, seed=seed, shuffle=True, fingerprint=fingerprint)

    first = sampler(10, "a")
    first.next_batch()
    state = first.state_dict()
    for rows, consumed in ((10, 4), (20, 0)):
        other = sampler(rows, "b")
        with pytest.raises(ValueError, match="made on other data"):
            other.load_state_dict(state)
        other.load_state_dict(state, is_data_allowed=True)
        assert other.rows_consumed == consumed
    other = sampler(10, "a", seed=2)
    with pytest.raises(ValueError, match="run.seed=1"):
        other.load_state_dict(state, allowed=["data.shuffle"])
    other.load_state_dict(state, allowed=["run"])
    assert other.rows_consumed == 4
