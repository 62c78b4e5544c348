"""Train a byte-level BPE tokenizer for a model that starts from scratch.

Byte-level BPE: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", over bytes as in Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners". All 256 bytes are in the vocabulary, so every text has token ids and
``decode(encode(text)) == text``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hetero_ppo.data.reading import read_rows

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

#: ChatML. The line break between two turns belongs to the later turn. So a conversation ends with the end-of-sequence token, and the
#: text of its first turns is a prefix of the text of all. ``generation`` marks what SFT learns: an answer and its end.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: Path,
    *,
    kind: str = "bpe",
    chat_template: str | None = CHATML_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on ``texts``, write it to ``out_dir`` as a transformers folder, and return it.

    The vocabulary has at most ``vocab_size`` entries: 3 special tokens, 256 bytes, and merges. It has fewer if the texts have no more pairs
    to merge. ``<|im_end|>`` is the end-of-sequence token, so that transformers and vLLM stop where a ChatML turn ends. ``<|endoftext|>`` is the
    padding and beginning-of-sequence token, which nothing adds by itself.

    Args:
        texts: Texts to learn the merges from.
        vocab_size: Most entries of the vocabulary.
        out_dir: Folder to write.
        kind: Kind of tokenizer; only "bpe" exists.
        chat_template: Jinja template that is stored with the tokenizer.

    Raises:
        ValueError: ``kind`` is unknown, ``vocab_size`` is below 3 + 256, or all texts are empty.
    """
    if kind != "bpe":
        raise ValueError(f"kind: unknown kind of tokenizer {kind!r}; the one that can be trained is 'bpe'")
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small for byte-level BPE, which starts with {smallest} entries "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens); give at least {smallest}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_non_empty(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def read_texts(path: Path, keys: Sequence[str]) -> Iterator[str]:
    """Yield the texts of a file: each line of a ``.txt``; the named fields of each row of a ``.jsonl`` or ``.parquet``.

    A field holds text or a list of chat messages. The texts of a message are its ``content`` and its ``role``, which a template writes. A row
    may lack some of ``keys``, but not all of them.

    Raises:
        ValueError: A row has none of the fields or is malformed; the message names file, line (row) and field.
        FileNotFoundError: The file does not exist.
    """
    if path.suffix == ".txt":
        with path.open(encoding="utf-8") as lines:
            yield from lines
        return
    for row in read_rows(str(path)):
        present = [key for key in keys if row.has(key)]
        if not present:
            raise ValueError(
                f"{row.place}: none of the fields {', '.join(keys)} is there (the row has: {', '.join(row.values)}); "
                "name the fields that hold text with --keys"
            )
        for key in present:
            if isinstance(row.values[key], list):
                for message in row.messages(key, with_turn_keys=True):
                    yield message["role"]
                    yield message["content"]
            else:
                yield row.text(key)


def _non_empty(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that are not empty; raise ValueError if there is none."""
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise ValueError("texts: there is no text to train a tokenizer on")
