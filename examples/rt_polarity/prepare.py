"""Split the sentence polarity reviews (Pang and Lee 2005) into the data of the rt_polarity runs.

    python examples/rt_polarity/prepare.py --data <folder with positive.txt and negative.txt> --out runs/rt_polarity/data

The reviews are split into three parts that share no sentence:

* ``policy``: reviews for SFT, the reward model and the PPO prompts;
* ``classifier``: reviews that only the independent classifier is trained on;
* ``held_out``: prompts, pairs and sentences that PPO, the reward model and the classifier are tested on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Number of words of a review that make a prompt.
PROMPT_WORDS = 4

#: A review with fewer words has too little left to complete.
MIN_WORDS = PROMPT_WORDS + 3

CLASSIFIER_FILE = "classifier_train.jsonl"
CLASSIFIER_TEST_FILE = "classifier_test.jsonl"


@dataclass(frozen=True)
class Sizes:
    """Numbers of reviews of each class, and of pairs per positive review."""

    classifier: int = 2000
    held_out: int = 300
    pairs_per_review: int = 4


@dataclass(frozen=True)
class Parts:
    """Reviews of one class."""

    policy: list[str]
    classifier: list[str]
    held_out: list[str]


def read_reviews(path: Path) -> list[str]:
    """Read the distinct reviews of a file, one per line, that are long enough. White space becomes single spaces.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has no usable line.
    """
    lines = (" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines())
    reviews = [line for line in dict.fromkeys(lines) if len(line.split()) >= MIN_WORDS]
    if not reviews:
        raise ValueError(f"{path}: no line has {MIN_WORDS} or more words; expected one review a line")
    return reviews


def split(rng: random.Random, reviews: Sequence[str], sizes: Sizes) -> Parts:
    """Shuffle the reviews of one class, and split them into parts.

    Raises:
        ValueError: Nothing would be left for the policy.
    """
    if len(reviews) <= sizes.classifier + sizes.held_out:
        raise ValueError(
            f"{len(reviews)} reviews of a class are too few: {sizes.classifier} are for the classifier and {sizes.held_out} held out"
        )
    shuffled = rng.sample(list(reviews), len(reviews))
    border = sizes.held_out + sizes.classifier
    return Parts(
        policy=shuffled[border:], classifier=shuffled[sizes.held_out : border], held_out=shuffled[: sizes.held_out]
    )


def sft_row(review: str) -> dict[str, object]:
    """Return a row with the first words as prompt and the rest as completion, which starts with the space between them."""
    words = review.split()
    return {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}


def prompt_row(review: str, classifier_data: str) -> dict[str, object]:
    """Return a row with the first words as prompt, and the file that the classifier learns from as metadata."""
    return {"prompt": " ".join(review.split()[:PROMPT_WORDS]), "metadata": {"classifier_data": classifier_data}}


def pairs(rng: random.Random, positive: Sequence[str], negative: Sequence[str], repeat: int) -> list[dict[str, object]]:
    """Combine each positive review ``repeat`` times with a negative one, each time with another where there are enough."""
    rows: list[dict[str, object]] = []
    for _ in range(repeat):
        count = min(len(positive), len(negative))
        chosen, rejected = rng.sample(list(positive), count), rng.sample(list(negative), count)
        rows += [{"chosen": good, "rejected": bad} for good, bad in zip(chosen, rejected, strict=True)]
    return rows


def classifier_rows(positive: Sequence[str], negative: Sequence[str]) -> list[dict[str, object]]:
    return [{"text": text, "positive": True} for text in positive] + [
        {"text": text, "positive": False} for text in negative
    ]


def make_rows(
    seed: int, positive: Sequence[str], negative: Sequence[str], sizes: Sizes, classifier_data: str
) -> dict[str, list[dict[str, object]]]:
    """Make the rows of every file; the same seed gives the same rows.

    Args:
        seed: Seed of the split, the pairing and the order of the prompts.
        positive: Distinct positive reviews.
        negative: Distinct negative reviews. Reviews of both classes are left out.
        sizes: Sizes of the parts.
        classifier_data: Path of the classifier's training sentences, as the prompts name it.

    Returns:
        File name -> rows.
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
        "prompts.jsonl": [prompt_row(review, classifier_data) for review in policy],
        "heldout.jsonl": [prompt_row(review, classifier_data) for review in held_out],
        CLASSIFIER_FILE: classifier_rows(good.classifier, bad.classifier),
        CLASSIFIER_TEST_FILE: classifier_rows(good.held_out, bad.held_out),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with positive.txt and negative.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    args = parser.parse_args(argv)
    positive, negative = (read_reviews(args.data / name) for name in ("positive.txt", "negative.txt"))
    args.out.mkdir(parents=True, exist_ok=True)
    classifier_data = str((args.out / CLASSIFIER_FILE).resolve())
    for name, rows in make_rows(args.seed, positive, negative, Sizes(), classifier_data).items():
        path = args.out / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
