"""Sample reviews from two exported models, and score them with the independent classifier.

    python examples/rt_polarity/evaluate.py --data runs/rt_polarity/data --before runs/rt_polarity/sft/hf \
        --after runs/rt_polarity/ppo/hf --json runs/rt_polarity/evaluation.json

The models are loaded with transformers, so neither the trainer nor its generator takes part. Next to the classifier's
scores the table has the signs of reward hacking: distinct n-grams, the share of reviews that repeat another one word for word,
and the most frequent three words. The scores of real held-out reviews are there for comparison.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from classifier import Sentences, accuracy, probabilities, read_sentences, train_classifier
from prepare import CLASSIFIER_FILE, CLASSIFIER_TEST_FILE
from sklearn.pipeline import Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

#: Number of prompts that are answered at once.
BATCH_SIZE = 100
NUM_SAMPLES = 6


@dataclass(frozen=True)
class Verdict:
    """Scores of some reviews, and measures of their diversity."""

    name: str
    reviews: int
    positive_mean: float  # mean P(positive)
    positive_share: float  # share with P(positive) over one half
    words: float  # mean words per review
    unfinished: float  # share that reached the length limit; 0 for real reviews
    distinct_1: float  # distinct words / words
    distinct_3: float  # distinct sequences of three words / all of them
    repeated: float  # share of reviews that have a copy
    top_3: str  # most frequent three words
    top_3_share: float  # share of reviews that contain them


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the sequences of ``n`` words, in order."""
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct n-grams over all n-grams, 0 without any (Li et al. 2016, "A Diversity-Promoting Objective Function")."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def most_frequent(texts: Sequence[str], n: int) -> tuple[str, float]:
    """Return the sequence of n words that most texts contain, and the share of these texts."""
    counts = Counter(gram for text in texts for gram in set(ngrams(text, n)))
    if not counts:
        return "", 0.0
    gram, count = counts.most_common(1)[0]
    return " ".join(gram), count / len(texts)


def describe_reviews(name: str, classifier: Pipeline, reviews: Sequence[str], unfinished: float) -> Verdict:
    """Score whole reviews, prompts included, and measure their diversity."""
    found = probabilities(classifier, reviews)
    copies = Counter(reviews)
    top, share = most_frequent(reviews, 3)
    return Verdict(
        name=name,
        reviews=len(reviews),
        positive_mean=sum(found) / len(found),
        positive_share=sum(p > 0.5 for p in found) / len(found),
        words=sum(len(review.split()) for review in reviews) / len(reviews),
        unfinished=unfinished,
        distinct_1=distinct(reviews, 1),
        distinct_3=distinct(reviews, 3),
        repeated=sum(copies[review] > 1 for review in reviews) / len(reviews),
        top_3=top,
        top_3_share=share,
    )


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int
) -> tuple[list[str], float]:
    """Sample one review per prompt at temperature 1. Return the reviews, and the share that did not end within ``max_tokens``."""
    reviews: list[str] = []
    unfinished = 0
    for start in range(0, len(prompts), BATCH_SIZE):
        block = list(prompts[start : start + BATCH_SIZE])
        inputs = tokenizer(block, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=True,
            top_k=0,
        )
        responses = output[:, inputs["input_ids"].shape[1] :]
        unfinished += int((responses != tokenizer.eos_token_id).all(dim=1).sum())
        reviews += [
            prompt + tokenizer.decode(response, skip_special_tokens=True)
            for prompt, response in zip(block, responses, strict=True)
        ]
    return reviews, unfinished / len(prompts)


def sample_reviews(folder: Path, prompts: Sequence[str], max_tokens: int, seed: int) -> tuple[list[str], float]:
    """Load the model in ``folder`` in fp32 and call ``complete``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    return complete(model, tokenizer, prompts, max_tokens)


def of_class(sentences: Sentences, positive: bool) -> list[str]:
    return [text for text, label in zip(sentences.texts, sentences.positive, strict=True) if label is positive]


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print(f"\n{'':<22}{'P(positive)':>12}{'share':>8}{'words':>7}{'unfinished':>12}{'dist-1':>8}{'dist-3':>8}", end="")
    print(f"{'copies':>8}  most frequent three words")
    for v in verdicts:
        print(
            f"{v.name:<22}{v.positive_mean:>12.3f}{v.positive_share:>8.3f}{v.words:>7.1f}{v.unfinished:>12.3f}"
            f"{v.distinct_1:>8.3f}{v.distinct_3:>8.3f}{v.repeated:>8.3f}  {v.top_3!r} in {100 * v.top_3_share:.1f} %"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--before", type=Path, required=True, help="exported model before PPO")
    parser.add_argument("--after", type=Path, required=True, help="exported model after PPO")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest response (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures and all reviews")
    args = parser.parse_args(argv)

    classifier = train_classifier(str(args.data / CLASSIFIER_FILE))
    real = read_sentences(str(args.data / CLASSIFIER_TEST_FILE))
    print(
        f"classifier: {100 * accuracy(classifier, real):.1f} % of {len(real.texts)} held-out real reviews classified right"
    )
    rows = (args.data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    before, before_unfinished = sample_reviews(args.before, prompts, args.max_tokens, args.seed)
    after, after_unfinished = sample_reviews(args.after, prompts, args.max_tokens, args.seed)
    verdicts = [
        describe_reviews("real positive", classifier, of_class(real, True), 0.0),
        describe_reviews("real negative", classifier, of_class(real, False), 0.0),
        describe_reviews("real, all", classifier, real.texts, 0.0),
        describe_reviews("before PPO", classifier, before, before_unfinished),
        describe_reviews("after PPO", classifier, after, after_unfinished),
    ]
    print_verdicts(verdicts)
    for old, new in list(zip(before, after, strict=True))[:NUM_SAMPLES]:
        print(f"\n  before: {old}\n   after: {new}")
    if args.json is not None:
        result = {
            "classifier_accuracy": accuracy(classifier, real),
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "before": before,
            "after": after,
        }
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
