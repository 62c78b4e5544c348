"""The function reward of the GSM8K example: which number an answer ends with, and the score for it."""

from __future__ import annotations

import importlib.util
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hetero_ppo.config.load import load_draft
from hetero_ppo.config.schema import ModelConfig
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sft import load_sft
from hetero_ppo.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gsm8k_reward", ROOT / "examples" / "gsm8k" / "reward.py")
reward = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reward)

LABEL = "She sells 1,000 + 234 = <<1000+234=1234>>1,234 eggs.\n#### 1,234"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("#### 1234", "1234"),
        ("####7", "7"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),  # the minus sign of typesetting
        ("#### 3.50", "3.5"),
        ("#### .5", "0.5"),
        ("#### $18", "18"),
        ("#### -$4", "-4"),
        ("#### $-4", "-4"),
        ("#### 72 clips", "72"),
        ("#### 5%", "5"),
        ("#### 1,234,567.25", "1234567.25"),
        ("#### 12.", "12"),
        ("#### 1\n#### 2", "2"),  # the last mark counts
        ("#### 18\nand then 99 more", "18"),  # and its line alone
        ("12 apples and 30 pears", "30"),  # no mark: the last number
        ("The answer is $1,000.", "1000"),
        ("16-3-4=<<16-3-4=9>>9 eggs", "9"),  # the hyphen between numbers is not a sign
        ("so 1,2,3", "3"),  # a list, not groups of three
        ("#### about 4, not 5", "4"),  # the first one behind the mark
        ("no number, not even in a4 or b2b", None),
        ("4 eggs\n####", "4"),  # a mark with nothing behind it
        ("", None),
    ],
)
def test_answer_number(text: str, number: str | None) -> None:
    expected = None if number is None else Decimal(number)
    assert reward.answer_number(text) == expected


@pytest.mark.parametrize(
    ("response", "score", "graded"),
    [
        ("it is 1,234 eggs\n#### 1234", 1.0, 1.0),
        ("#### 1,234.00", 1.0, 1.0),  # the same number, written otherwise
        ("that makes 1234", 1.0, 1.0),
        ("#### 1235", 0.0, 0.1),
        ("#### -1234", 0.0, 0.1),
        ("1234 first, then\n#### 8", 0.0, 0.1),  # the mark counts, not the right number before it
        ("that makes 12", 0.0, 0.0),
        ("####", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_scores(response: str, score: float, graded: float) -> None:
    assert reward.final_number("q", response, LABEL, {}) == score
    assert reward.graded("q", response, LABEL, {}) == graded


@pytest.mark.parametrize("label", ["1234", None, 1234, "#### none"])
def test_a_label_without_a_marked_number_is_an_error(label: object) -> None:
    with pytest.raises(ValueError, match="data.label_key has to name the field with the worked answer"):
        reward.final_number("How many?", "#### 3", label, {})


def test_the_configs_read_questions_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    questions = ["How many eggs are 1,000 and 234 eggs?", "What is left of 9 when 2 are gone?"]
    answers = [LABEL, "9 - 2 = <<9-2=7>>7\n#### 7"]
    path.write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(questions, answers, strict=True))
    )
    train_tokenizer(questions + answers, 400, tmp_path / "tokenizer")
    model = ModelConfig(path=str(tmp_path / "tokenizer"))

    def data_config(kind: str) -> Any:
        return OmegaConf.to_object(
            load_draft(str(ROOT / "configs" / kind / "gsm8k.yaml"), [f"data.train={path}"]).node.data
        )

    ppo = data_config("ppo")
    encoder = load_text_encoder(model, ppo, "actor")
    prompts = load_prompts(str(path), ppo, encoder)
    sft = load_sft(str(path), data_config("sft"), encoder)
    for prompt, example, question, answer in zip(prompts.examples, sft.examples, questions, answers, strict=True):
        assert prompt.label == answer
        start, end = example.answer_spans[0]
        # What the engine continues is what SFT put before the answer; the worked answer itself scores 1.
        assert example.token_ids[:start] == prompt.prompt_ids
        assert question in encoder.decode(prompt.prompt_ids)
        assert reward.graded(question, encoder.decode(example.token_ids[start:end]), prompt.label, {}) == 1.0
