"""Token ids where an answer begins and ends: those of generation, and of transformers where both agree."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.conversation import encode_responses
from hetero_ppo.data.end_tokens import EndToken, find_end_tokens
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sft import load_sft

ANSWERS = ["apple pear", "\napple", "\n\n pear", " apple\n", "<p>"]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def multi_turn(answers: list[str]) -> list[dict[str, str]]:
    """Return a conversation in which each of ``answers`` follows a question."""
    return [message for answer in answers for message in (turn("user", "hello"), turn("assistant", answer))]


@cache
def merging_encoder() -> TextEncoder:
    """Make a ChatML encoder with a BPE that merges line breaks, as those of Qwen and Llama do."""
    tokenizer = chatml_encoder().tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [["Ċ", "Ċ"], ["ĊĊ", "Ċ"]]
    for left, right in merges:
        spec["model"]["vocab"][left + right] = len(tokenizer) + merges.index([left, right])
    spec["model"]["merges"] = merges + spec["model"]["merges"]
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    return TextEncoder(merging, chatml_encoder().template, [], merging.eos_token_id, "merging")


@cache
def sentencepiece_encoder() -> TextEncoder:
    """Make a tokenizer in the form of Llama 2's: a space before every text, bytes for unknown characters, a begin token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        ["sort pear apple\n", "Sorted: apple pear"] * 3,
        trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False, initial_alphabet=list("\n")),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TextEncoder(tokenizer, None, [1], 2, "sentencepiece")


def test_no_token_lies_over_the_beginning_of_an_answer(tmp_path: Path) -> None:
    encoder = merging_encoder()
    row = {"prompt": "hello", "completion": "\n\napple", "chosen": "\n\napple", "rejected": "\npear"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    (prompt,) = load_prompts(path, data_config(load_prompts), encoder).examples
    (example,) = load_sft(path, data_config(load_sft), encoder).examples
    (pair,) = load_preferences(path, data_config(load_preferences), encoder).examples
    text = encoder.render(multi_turn(["\n\napple"]), add_generation_prompt=False)
    assert encoder.encode([text])[0][: len(prompt.prompt_ids)] != prompt.prompt_ids, (
        "the tokenizer merges over the border"
    )
    (answer,) = encoder.encode(["\n\napple<|im_end|>"])
    assert example.token_ids == pair.chosen_ids == [*prompt.prompt_ids, *answer]
    assert example.answer_spans == [(len(prompt.prompt_ids), len(example.token_ids))]
    assert pair.rejected_ids == [*prompt.prompt_ids, *encoder.encode(["\npear<|im_end|>"])[0]]


@pytest.mark.parametrize("answers", [ANSWERS, ANSWERS[::-1], ["\n", "a", "\n\n\nb"]])
def test_the_context_of_every_turn_is_what_generation_would_have_seen(tmp_path: Path, answers: list[str]) -> None:
    encoder = merging_encoder()
    answers = [answer if answer.strip() else f"{answer}." for answer in answers]
    messages = multi_turn(answers)
    (example,) = load_sft(
        write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), data_config(load_sft), encoder
    ).examples
    asked = [{"prompt": messages[: 2 * turn + 1]} for turn in range(len(answers))]
    prompts = load_prompts(write_jsonl(tmp_path / "b.jsonl", asked), data_config(load_prompts), encoder).examples
    for (start, end), answer, prompt in zip(example.answer_spans, answers, prompts, strict=True):
        assert example.token_ids[:start] == prompt.prompt_ids
        assert encoder.tokenizer.decode(example.token_ids[start:end]) == f"{answer}<|im_end|>"
    as_prompt = {"prompt": messages[:-1], "completion": messages[-1:]}
    (again,) = load_sft(write_jsonl(tmp_path / "c.jsonl", [as_prompt]), data_config(load_sft), encoder).examples
    assert again.token_ids == example.token_ids and again.answer_spans == example.answer_spans[-1:]
    assert encode_responses(encoder, [(messages[:-1], "", answers[-1], True)]) == [example.token_ids]


def test_ids_and_masks_are_those_of_transformers(tmp_path: Path) -> None:
    """No answer here begins with text that merges. The template marks what is learned."""
    encoder = chatml_encoder()
    messages = [turn("system", "sort"), *multi_turn(["apple pear", "<p>", "hello there"])]
    (example,) = load_sft(
        write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), data_config(load_sft), encoder
    ).examples
    theirs = encoder.tokenizer.apply_chat_template(
        messages, chat_template=encoder.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = [
        int(any(start <= place < end for start, end in example.answer_spans)) for place in range(example.num_tokens)
    ]
    assert example.token_ids == list(theirs["input_ids"])
    assert ours == list(theirs["assistant_masks"])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("sort: pear", " Sorted: pear"),
        ("sort: pear\n", "Sorted: pear"),
        ("sort", "\n\nSorted"),
        ("pear ", "  apple"),
        ("a:", ": a:"),
    ],
)
def test_a_sentencepiece_tokenizer_puts_no_space_between_prompt_and_answer(
    tmp_path: Path, prompt: str, completion: str
) -> None:
    encoder = sentencepiece_encoder()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}])
    (example,) = load_sft(path, data_config(load_sft, apply_chat_template=False), encoder).examples
    assert encoder.decode(example.token_ids) == prompt + completion
    (asked,) = load_prompts(path, data_config(load_prompts, apply_chat_template=False), encoder).examples
    assert example.token_ids[: example.answer_spans[0][0]] == asked.prompt_ids
    assert encode_responses(encoder, [(None, prompt, completion, True)]) == [example.token_ids]


def test_an_answer_may_end_with_any_token_that_ends_a_sequence(tmp_path: Path) -> None:
    """A base model's tokenizer ends with <|endoftext|>, its template with <|im_end|>, which generation_config.json names."""
    encoder = chatml_encoder()
    tokenizer = encoder.tokenizer
    end_of_text, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    ordinary = tokenizer.convert_tokens_to_ids("e")
    ends = (EndToken(im_end, "<|im_end|>", ("generation_config.json",)), EndToken(ordinary, "e", ("config.json",)))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "apple pears"}])
    for end_tokens, end in (((), "<|im_end|><|endoftext|>"), (ends, "<|im_end|>")):
        other = TextEncoder(tokenizer, encoder.template, [], end_of_text, "base", end_tokens)
        (example,) = load_sft(path, data_config(load_sft), other).examples
        ((start, stop),) = example.answer_spans
        assert tokenizer.decode(example.token_ids[start:stop]) == f"apple pears{end}"


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, None, {2: ("tokenizer",)}),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 2]}, {2: ("tokenizer", "generation_config.json"), 0: ("config.json", "generation_config.json")}),
        ({"eos_token_id": [2, 1]}, {"eos_token_id": None}, {2: ("tokenizer", "config.json"), 1: ("config.json",)}),
    ],
)  # fmt: skip
def test_ends_are_the_union_of_tokenizer_and_model(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, found: dict[int, tuple[str, ...]]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ends = find_end_tokens(chatml_encoder().tokenizer, str(tmp_path))
    assert {end.token_id: end.sources for end in ends} == found and ends[0].token == "<|im_end|>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        find_end_tokens(chatml_encoder().tokenizer, str(tmp_path))


@pytest.mark.parametrize(
    "template", [None, "<|endoftext|><|endoftext|>{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_sequence_that_begins_twice_is_refused(tmp_path: Path, template: str | None) -> None:
    tokenizer = chatml_encoder().tokenizer
    encoder = TextEncoder(tokenizer, template, [tokenizer.bos_token_id], tokenizer.eos_token_id, "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "<|endoftext|>hello", "completion": "there"}])
    for load in (load_sft, load_prompts):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the sequence begins with '<\|endoftext\|>' twice"):
            load(path, data_config(load, apply_chat_template=template is not None), encoder)
