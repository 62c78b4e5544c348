"""Responses as a reward model with another tokenizer reads them: the ids of its own data path, and the cases that data has not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl
from tests.helpers.re_encoding_cases import SCORER_TEMPLATE, rollout_of

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.collate import pad_right
from hetero_ppo.data.sft import load_sft
from hetero_ppo.data.tokenizer_training import train_tokenizer
from hetero_ppo.errors import RunError
from hetero_ppo.reward.re_encoding import ReEncoder, special_texts, remove_texts
from hetero_ppo.types import Messages, Rollout

QUESTION: Messages = [{"role": "user", "content": "Sort pear apple"}]
CONVERSATION: Messages = [
    *QUESTION,
    {"role": "assistant", "content": "apple pear"},
    {"role": "user", "content": "Again"},
]


@cache
def scorer(template: str | None = SCORER_TEMPLATE, prefix: tuple[int, ...] = ()) -> TextEncoder:
    """Make an encoder with another vocabulary than ``chatml_encoder``'s and another end-of-sequence token."""
    with TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["[user] [assistant] sort pear apple again"] * 9, 280, Path(folder))
    tokenizer.eos_token = "<|endoftext|>"
    return TextEncoder(tokenizer, template, list(prefix), tokenizer.eos_token_id, "scorer")


def encoded(rollout: Rollout, encoder: TextEncoder, max_tokens: int = 512) -> tuple[list[list[int]], dict[str, float]]:
    re_encoder = ReEncoder("reward_model", encoder, chatml_encoder(), max_tokens)
    ids, lengths = re_encoder.encode(rollout)
    return [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)], re_encoder.collect()


@pytest.mark.parametrize("answer", ["apple pear", " apple", "", "päär 🍐\n[user] apple", "assistant] pear"])
@pytest.mark.parametrize("messages", [QUESTION, CONVERSATION])
def test_ids_are_those_of_the_reward_models_own_data(tmp_path: Path, messages: Messages, answer: str) -> None:
    found, _ = encoded(rollout_of(chatml_encoder(), [(messages, answer, True)]), scorer())
    whole = scorer().encode([scorer().render([*messages, {"role": "assistant", "content": answer}], False)])[0]
    assert whole[: len(found[0])] == found[0] and scorer().tokenizer.decode(whole[len(found[0]) :]) == "\n"
    assert found[0][-1] == scorer().eos_token_id and scorer().eos_token_id != chatml_encoder().eos_token_id
    if answer == "apple pear":  # what `hetero-ppo score` reads
        rows = [{"messages": [*messages, {"role": "assistant", "content": answer}]}]
        data = load_sft(write_jsonl(tmp_path / "rows.jsonl", rows), data_config(load_sft), chatml_encoder())
        chatml, _ = encoded(rollout_of(chatml_encoder(), [(messages, answer, True)]), chatml_encoder())
        assert chatml == [data.examples[0].token_ids]


def test_text_without_a_template(tmp_path: Path) -> None:
    plain = scorer(None, prefix=(7,))
    rows = [{"prompt": "Sort pear apple: ", "completion": "apple"}]
    data = load_sft(write_jsonl(tmp_path / "rows.jsonl", rows), data_config(load_sft, apply_chat_template=False), plain)
    found, _ = encoded(rollout_of(chatml_encoder(), [(None, "apple", True), (None, "apple", False)]), plain)
    assert found == [data.examples[0].token_ids, data.examples[0].token_ids[:-1]]


def test_a_response_that_was_cut_has_no_end() -> None:
    found, _ = encoded(
        rollout_of(chatml_encoder(), [(QUESTION, "apple pear", True), (QUESTION, "apple pear", False)]), scorer()
    )
    assert found[1] == found[0][:-1] and scorer().eos_token_id not in found[1]


def test_a_long_sequence_is_cut_at_its_end_and_counted() -> None:
    rollout = rollout_of(chatml_encoder(), [(QUESTION, "apple " * 20, True), (QUESTION, "apple", True)])
    whole, metrics = encoded(rollout, scorer())
    lengths = [len(ids) for ids in whole]
    assert metrics == {"length/mean": sum(lengths) / 2, "num_cut": 0.0}
    limit = lengths[1] + 1
    found, metrics = encoded(rollout, scorer(), limit)
    assert found == [whole[0][:limit], whole[1]] and metrics == {"length/mean": sum(lengths) / 2, "num_cut": 1.0}


def test_a_response_cannot_write_special_tokens_of_the_reward_model() -> None:
    """The scorer's end of sequence, also where taking one out would leave another."""
    end = scorer().tokenizer.eos_token
    assert end in special_texts(scorer().tokenizer)
    assert remove_texts(f"a{end[:5]}{end}{end[5:]}b", [end]) == "ab"
    actor = rollout_of(chatml_encoder(), [(QUESTION, "apple pear", True)])
    found, _ = encoded(actor, scorer())
    written = rollout_of(chatml_encoder(), [(QUESTION, "", True)])
    ids = [chatml_encoder().encode([character])[0][0] for character in f"apple{end} pear"]  # as text, not as the token
    token_ids, lengths = pad_right([written.token_ids[0, : int(written.prompt_lengths[0])].tolist() + ids])
    written = Rollout(**{**vars(written), "token_ids": token_ids, "sequence_lengths": lengths})
    assert encoded(written, scorer())[0] == found


def test_a_template_that_refuses_prompts_is_found_before_the_run() -> None:
    system: Messages = [{"role": "system", "content": "Be brief"}, *QUESTION]
    re_encoder = ReEncoder("reward_models.1", scorer(), chatml_encoder(), 99)
    re_encoder.check_templates([QUESTION, None, CONVERSATION])
    message = (
        "reward_models.1.re_encode: .* roles system, user.*no system turns.*set reward_models.1.re_encode.chat_template"
    )
    with pytest.raises(ValueError, match=message):
        re_encoder.check_templates([QUESTION, system])
    with pytest.raises(RunError, match="reward_models.1.re_encode: .*no system turns"):
        re_encoder.encode(rollout_of(chatml_encoder(), [(system, "apple", True)]))


def test_what_ids_depend_on_is_in_the_fingerprint() -> None:
    encoders = [scorer(), scorer(None), scorer(None, prefix=(7,)), chatml_encoder(), chatml_encoder(None)]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)
    assert scorer().fingerprint[:12] in ReEncoder("reward_model", scorer(), chatml_encoder(), 99).describe()
