"""An export takes along what transformers reads, and both generators stop where a run's sequences end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.helpers.one_rank import ONE_RANK
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hetero_ppo.config.schema import DataConfig, Dtype, ModelConfig, PpoConfig
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.export_files import export_files
from hetero_ppo.data.tokenizer_training import train_tokenizer
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.step.placement import run_placement
from hetero_ppo.trainers import ppo_generator

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"


def model_folder(folder: Path, *, template_in_config: bool = False) -> Path:
    """Write a tokenizer and the JSON files of a model whose generation ends with 2 or 0."""
    train_tokenizer(["user assistant hello"] * 3, 280, folder)
    if template_in_config:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2, "vocab_size": 280}))
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("template_in_config", [False, True])
def test_an_export_has_the_runs_template_and_ends(tmp_path: Path, template_in_config: bool) -> None:
    folder = model_folder(tmp_path / "model", template_in_config=template_in_config)
    (tmp_path / "other.jinja").write_text(TEMPLATE)
    data = DataConfig(train="unused.jsonl", chat_template=str(tmp_path / "other.jinja"))
    encoder = load_text_encoder(ModelConfig(path=str(folder)), data, "actor")
    more = export_files(encoder, str(folder), "lm")
    for name, text in more.files.items():
        (folder / name).write_text(text)
    tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert generation.eos_token_id == [2, 0] and generation.pad_token_id == 0 and generation.temperature == 0.6
    again = load_text_encoder(ModelConfig(path=str(folder)), DataConfig(train="unused.jsonl"), "actor")
    assert again.render([{"role": "user", "content": "hello"}], False) == "[user] hello<|im_end|>"
    assert again.end_token_ids == encoder.end_token_ids == [2, 0]


def test_a_tokenizers_own_template_is_left_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    encoder = load_text_encoder(ModelConfig(path=str(folder)), DataConfig(train="unused.jsonl"), "actor")
    more = export_files(encoder, str(folder), "lm")
    assert list(more.files) == ["generation_config.json"] and more.config == {}
    assert json.loads(more.files["generation_config.json"]) == {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 0}


@pytest.mark.parametrize(("pad", "exported"), [("<|im_start|>", 1), ("<|im_end|>", None), (None, None)])
def test_a_classifier_is_never_padded_with_what_ends_a_sequence(
    tmp_path: Path, pad: str | None, exported: int | None
) -> None:
    folder = model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    encoder = load_text_encoder(ModelConfig(path=str(folder)), DataConfig(train="unused.jsonl"), "reward")
    more = export_files(encoder, str(folder), "score")
    config = {**json.loads((folder / "config.json").read_text()), **more.config}
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(folder).pad_token_id == exported


def test_the_tokenizer_and_the_template_are_those_of_the_options(tmp_path: Path) -> None:
    folder, other = model_folder(tmp_path / "model"), model_folder(tmp_path / "other")
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    own = (folder / "chat_template.jinja").read_text()
    for tokenizer, data, source, template in (
        (None, {}, folder, own),
        (other, {}, other, own),
        (None, {"chat_template": str(tmp_path / "mine.jinja")}, folder, TEMPLATE),
        (None, {"apply_chat_template": False}, folder, None),
    ):
        model = ModelConfig(path=str(folder), tokenizer=None if tokenizer is None else str(tokenizer))
        encoder = load_text_encoder(model, DataConfig(train="unused.jsonl", **data), "actor")
        assert (encoder.source, encoder.template) == (str(source), template)


def test_both_generators_stop_at_every_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    config = PpoConfig()
    config.actor.model.path, config.actor.model.dtype = str(folder), Dtype.fp32
    encoder = load_text_encoder(config.actor.model, DataConfig(train="unused.jsonl"), "actor")
    given: list[dict[str, Any]] = []

    def record(self: object, *args: object, **arguments: Any) -> None:
        given.append(arguments)

    for kind in (MegatronGenerator, VllmGenerator):
        monkeypatch.setattr(kind, "__init__", record)
    run: Any = SimpleNamespace(world=ONE_RANK, world_size=1, dir=tmp_path)
    ppo_generator.generator_of_actor(config.rollout, encoder, None, max_model_len=9)
    ppo_generator.build_generator(config, run, encoder, 0, None, run_placement(config, 1))
    assert [arguments["eos_token_ids"] for arguments in given] == [[2, 0], [2, 0]]
