"""Tokenizers trained from text, and checkpoints that start from random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hetero_ppo.cli import init_model
from hetero_ppo.cli import tokenizer as tokenizer_command
from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE, read_texts, train_tokenizer

WORDS = ["bean", "cake", "fern", "lake", "mask", "tile"]
TURNS = [
    {"role": "user", "content": "Sort: cake bean"},
    {"role": "assistant", "content": "bean cake"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "tile"},
]


def texts() -> list[str]:
    orders = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    return [f"Sort these: {order}" for order in orders] + orders + ["user", "assistant"] * 4


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    tokenizer_command.register(subparsers)
    init_model.register(subparsers)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(), 400, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("word", [*WORDS, "Sort", "user", "assistant"])
def test_a_frequent_word_is_one_token(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    assert len(tokenizer.encode(word)) == 1


@pytest.mark.parametrize("word", WORDS)
def test_a_word_after_a_space_is_one_token_too(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    assert len(tokenizer.encode(f" {word}")) == 1
    assert tokenizer.encode(f" {word}") != tokenizer.encode(word)


@pytest.mark.parametrize("text", ["bean cake", "  two  spaces , \n\ttabs", "naïve 東京 🙂", "\x00\x7f", "it 's n't"])
def test_decode_undoes_encode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert tokenizer.encode("<|im_start|>bean<|im_end|>") == [
        tokenizer.convert_tokens_to_ids("<|im_start|>"),
        *tokenizer.encode("bean"),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(tokenizer.encode("bean<|im_end|>"), skip_special_tokens=True) == "bean"
    assert tokenizer.bos_token_id not in tokenizer.encode("bean")


def test_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.apply_chat_template(TURNS[:2], tokenize=False) == (
        "<|im_start|>user\nSort: cake bean<|im_end|>\n<|im_start|>assistant\nbean cake<|im_end|>"
    )
    assert tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nSort: cake bean<|im_end|>\n<|im_start|>assistant\n"
    )


def test_first_turns_are_a_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    for turns in (1, 2, 3):
        prompt = turns % 2 == 1
        part = tokenizer.apply_chat_template(TURNS[:turns], tokenize=False, add_generation_prompt=prompt)
        assert whole.startswith(part)


def test_assistant_mask_covers_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, keep in zip(encoded["input_ids"], encoded["assistant_masks"]) if keep]
    assert tokenizer.decode(learned) == "bean cake<|im_end|>tile<|im_end|>"


def test_vocabulary_is_never_larger_than_asked(tmp_path: Path) -> None:
    assert len(train_tokenizer(texts(), 270, tmp_path)) == 270


def test_training_again_gives_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(texts(), 400, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 258}, "vocab_size: 258 is too small .* at least 259"),
        ({"vocab_size": 300, "kind": "unigram"}, "kind: unknown kind of tokenizer 'unigram'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts(), out_dir=tmp_path, **kwargs)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer(["", ""], 300, tmp_path)


def test_read_texts_of_strings_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [TURNS[0], {**TURNS[1], "weight": 0}]  # a tokenizer has to write turns that are not learned, too
    path.write_text(json.dumps({"messages": turns}) + "\n\n" + json.dumps({"prompt": "p", "other": 1}) + "\n")
    assert list(read_texts(path, ["messages", "prompt"])) == ["user", "Sort: cake bean", "assistant", "bean cake", "p"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', r"a.jsonl, line 2: not valid JSON"),
        ("[1]", r"a.jsonl, line 2: expected a JSON object, got list"),
        (
            '{"question": "p"}',
            r"a.jsonl, line 2: none of the fields messages, prompt is there \(the row has: question\)",
        ),
        ('{"prompt": 3}', r"a.jsonl, line 2, field 'prompt': expected text, got int"),
        ('{"messages": [{"role": "user"}]}', r"a.jsonl, line 2, field 'messages\[0\]': 'content' has to be text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_texts(path, ["messages", "prompt"]))


def test_unknown_ending_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a data file ends in .jsonl"):
        path = tmp_path / "a.csv"
        path.write_text("prompt\n")
        list(read_texts(path, ["prompt"]))


def test_tokenizer_command(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "completion": "bean"}) + "\n" for text in texts()))
    args = parse("tokenizer", "--input", str(path), "--vocab-size", "280", "--out", str(tmp_path / "out"))
    args.run(args)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 280
    assert tokenizer.chat_template == CHATML_TEMPLATE
    with pytest.raises(ValueError, match="there is tokenizer.json already.*--overwrite"):
        args.run(args)
    args.overwrite = True
    args.run(args)


def init_arguments(folder: Path, out: Path, family: str, *more: str) -> argparse.Namespace:
    sizes = ["--hidden-size", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--ffn", "48"]
    return parse(
        "init-model", "--family", family, *sizes, "--tokenizer", str(folder), "--out", str(out), "--seed", "5", *more
    )


@pytest.mark.parametrize("family", init_model.FAMILIES)
def test_init_model_writes_a_whole_checkpoint(folder: Path, tmp_path: Path, family: str) -> None:
    args = init_arguments(folder, tmp_path / "model", family)
    args.run(args)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    assert model.config.vocab_size % 64 == 0 and 0 <= model.config.vocab_size - len(tokenizer) < 64
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.num_key_value_heads == 2
    assert model.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    # An untrained model knows nothing: its loss is that of a uniform guess.
    ids = torch.tensor([tokenizer.encode("Sort these: bean cake fern")])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), abs=0.3)


def test_init_model_repeats_with_its_seed(folder: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        args = init_arguments(folder, tmp_path / name, "llama", "--tie")
        args.seed = int(seed)
        args.run(args)
        runs.append(load_file(tmp_path / name / "model.safetensors"))
    first, same, other = runs
    assert "lm_head.weight" not in first
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_init_model_does_not_write_over_a_model(folder: Path, tmp_path: Path) -> None:
    """Nor beside one: the index of a model in several files would go on to be read."""
    out = tmp_path / "model"
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (out / name).write_text("theirs")
    args = init_arguments(folder, out, "llama")
    with pytest.raises(
        ValueError, match="there is config.json, model-00001-of-00002.safetensors.*already.*--overwrite"
    ):
        args.run(args)
    assert (out / "config.json").read_text() == "theirs"
    args.overwrite = True
    args.run(args)
    assert not list(out.glob("*.index.json")) and (out / "notes.txt").exists() and (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("llama", ["--kv-heads", "3"], "--kv-heads: 3 does not divide --heads 4"),
        ("llama", ["--heads", "6"], "--heads: 6 does not divide --hidden-size 32"),
        ("qwen3", ["--head-dim", "7"], "--head-dim: 7 is odd"),
        ("qwen2", ["--head-dim", "16"], "--head-dim: 16 times --heads 4 is not --hidden-size 32"),
    ],
)
def test_sizes_that_do_not_fit(folder: Path, tmp_path: Path, family: str, more: list[str], message: str) -> None:
    args = init_arguments(folder, tmp_path / "model", family, *more)
    with pytest.raises(ValueError, match=message):
        args.run(args)
    assert not (tmp_path / "model").exists()
