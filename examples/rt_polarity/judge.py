"""An independent judge of sentiment: TF-IDF and logistic regression on reviews that no training stage sees.

It shares neither data nor architecture with the reward model, so a policy that only learns what the reward model likes
does not please it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences."""

    texts: list[str]
    positive: list[bool]


def read_sentences(path: str) -> Sentences:
    """Rows ``{"text": ..., "positive": true or false}``."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Sentences([row["text"] for row in rows], [row["positive"] for row in rows])


@functools.cache
def train_judge(path: str) -> Pipeline:
    """The classifier of the sentences in ``path``; trained once per process, in about a second."""
    sentences = read_sentences(path)
    # The token pattern keeps words of one letter and the apostrophe of "isn't".
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b[\w'-]+")
    judge = make_pipeline(vectoriser, LogisticRegression(C=3.0, max_iter=1000))
    return judge.fit(sentences.texts, sentences.positive)


def probabilities(judge: Pipeline, texts: Sequence[str]) -> list[float]:
    """P(positive) of each text."""
    return judge.predict_proba(list(texts))[:, 1].tolist()


def accuracy(judge: Pipeline, sentences: Sentences) -> float:
    """Share of sentences whose class the judge finds."""
    found = probabilities(judge, sentences.texts)
    return sum((p > 0.5) == positive for p, positive in zip(found, sentences.positive, strict=True)) / len(found)


def positive(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """P(positive) of the whole review, prompt and response. ``metadata["judge_data"]``: what the judge learns from."""
    if "judge_data" not in metadata:
        raise ValueError(
            f"prompt {prompt!r} has no metadata.judge_data, the file that the judge learns from; "
            "examples/rt_polarity/prepare.py writes it"
        )
    return probabilities(train_judge(metadata["judge_data"]), [prompt + response])[0]
