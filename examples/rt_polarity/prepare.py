"""Splits the sentence polarity reviews (Pang and Lee 2005) into the data of the rt_polarity runs.

    python examples/rt_polarity/prepare.py --data <folder with positive.txt and negative.txt> --out runs/rt_polarity/data

The reviews fall into three parts that share no sentence:

* ``policy``: what SFT, the reward model and the PPO prompts see;
* ``judge``: what the independent classifier is trained on, and nothing else;
* ``held_out``: the prompts that PPO is judged on, the pairs that the reward model is judged on, and the sentences that
  the judge itself is judged on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Words of a review that make a prompt.
PROMPT_WORDS = 4

#: A review with fewer words has too little left to complete.
MIN_WORDS = PROMPT_WORDS + 3

JUDGE_FILE = "judge_train.jsonl"
JUDGE_TEST_FILE = "judge_test.jsonl"


@dataclass(frozen=True)
class Sizes:
    """Reviews of each class, and pairs per positive review."""

    judge: int = 2000
    held_out: int = 300
    pairs_per_review: int = 4


@dataclass(frozen=True)
class Parts:
    """Reviews of one class."""

    policy: list[str]
    judge: list[str]
    held_out: list[str]


def read_reviews(path: Path) -> list[str]:
    """The distinct reviews of a file that are long enough, one a line, white space made single spaces.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no usable line.
    """
    lines = (" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines())
    reviews = [line for line in dict.fromkeys(lines) if len(line.split()) >= MIN_WORDS]
    if not reviews:
        raise ValueError(f"{path}: no line has {MIN_WORDS} or more words; expected one review a line")
    return reviews


def split(rng: random.Random, reviews: Sequence[str], sizes: Sizes) -> Parts:
    """Shuffled parts of one class.

    Raises:
        ValueError: nothing would be left for the policy.
    """
    if len(reviews) <= sizes.judge + sizes.held_out:
        raise ValueError(
            f"{len(reviews)} reviews of a class are too few: {sizes.judge} are for the judge and {sizes.held_out} held out"
        )
    shuffled = rng.sample(list(reviews), len(reviews))
    border = sizes.held_out + sizes.judge
    return Parts(policy=shuffled[border:], judge=shuffled[sizes.held_out : border], held_out=shuffled[: sizes.held_out])


def sft_row(review: str) -> dict[str, object]:
    """The first words as prompt, the rest as completion; the space between them begins the completion."""
    words = review.split()
    return {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}


def prompt_row(review: str, judge_data: str) -> dict[str, object]:
    """The first words, and for the judge the file that it learns from."""
    return {"prompt": " ".join(review.split()[:PROMPT_WORDS]), "metadata": {"judge_data": judge_data}}


def pairs(rng: random.Random, positive: Sequence[str], negative: Sequence[str], repeat: int) -> list[dict[str, object]]:
    """Each positive review ``repeat`` times, against another negative one each time where there are enough."""
    rows: list[dict[str, object]] = []
    for _ in range(repeat):
        count = min(len(positive), len(negative))
        chosen, rejected = rng.sample(list(positive), count), rng.sample(list(negative), count)
        rows += [{"chosen": good, "rejected": bad} for good, bad in zip(chosen, rejected, strict=True)]
    return rows


def judge_rows(positive: Sequence[str], negative: Sequence[str]) -> list[dict[str, object]]:
    return [{"text": text, "positive": True} for text in positive] + [
        {"text": text, "positive": False} for text in negative
    ]


def make_rows(
    seed: int, positive: Sequence[str], negative: Sequence[str], sizes: Sizes, judge_data: str
) -> dict[str, list[dict[str, object]]]:
    """File name -> rows, the same for the same seed.

    Args:
        seed: of the split, the pairing and the order of the prompts.
        positive: distinct positive reviews.
        negative: distinct negative reviews; those that are positive ones too belong to neither class and are left out.
        sizes: of the parts.
        judge_data: path of the judge's training sentences, as the prompts name it.
    """
    rng = random.Random(seed)
    both = set(positive) & set(negative)
    good = split(rng, [review for review in positive if review not in both], sizes)
    bad = split(rng, [review for review in negative if review not in both], sizes)
    policy = rng.sample(good.policy + bad.policy, len(good.policy) + len(bad.policy))
    held_out = rng.sample(good.held_out + bad.held_out, len(good.held_out) + len(bad.held_out))
    return {
        "sft.jsonl": [sft_row(review) for review in policy],
        "sft_eval.jsonl": [sft_row(review) for review in held_out],
        "preference.jsonl": pairs(rng, good.policy, bad.policy, sizes.pairs_per_review),
        "preference_eval.jsonl": pairs(rng, good.held_out, bad.held_out, 1),
        "prompts.jsonl": [prompt_row(review, judge_data) for review in policy],
        "heldout.jsonl": [prompt_row(review, judge_data) for review in held_out],
        JUDGE_FILE: judge_rows(good.judge, bad.judge),
        JUDGE_TEST_FILE: judge_rows(good.held_out, bad.held_out),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with positive.txt and negative.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    positive, negative = (read_reviews(args.data / name) for name in ("positive.txt", "negative.txt"))
    args.out.mkdir(parents=True, exist_ok=True)
    judge_data = str((args.out / JUDGE_FILE).resolve())
    for name, rows in make_rows(args.seed, positive, negative, Sizes(), judge_data).items():
        path = args.out / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
