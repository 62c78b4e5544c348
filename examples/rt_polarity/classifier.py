"""An independent classifier of sentiment: TF-IDF and logistic regression on reviews that no training stage sees.

It shares neither data nor architecture with the reward model. A policy that exploits the reward model's errors gets no higher score
here.
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
    """Read rows ``{"text": ..., "positive": true or false}``."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Sentences([row["text"] for row in rows], [row["positive"] for row in rows])


@functools.cache
def train_classifier(path: str) -> Pipeline:
    """Train the classifier on the sentences in ``path``, once per process. It takes about a second."""
    sentences = read_sentences(path)
    # The token pattern keeps words of one letter and the apostrophe of "isn't".
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b[\w'-]+")
    classifier = make_pipeline(vectoriser, LogisticRegression(C=3.0, max_iter=1000))
    return classifier.fit(sentences.texts, sentences.positive)


def probabilities(classifier: Pipeline, texts: Sequence[str]) -> list[float]:
    """Return P(positive) of each text."""
    return classifier.predict_proba(list(texts))[:, 1].tolist()


def accuracy(classifier: Pipeline, sentences: Sentences) -> float:
    """Return the share of sentences that are classified right."""
    found = probabilities(classifier, sentences.texts)
    return sum((p > 0.5) == positive for p, positive in zip(found, sentences.positive, strict=True)) / len(found)


def positive(prompt: str, response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return P(positive) of the whole review, prompt and response.

    ``metadata["classifier_data"]`` is the file that the classifier learns from.
    """
    if "classifier_data" not in metadata:
        raise ValueError(
            f"prompt {prompt!r} has no metadata.classifier_data, the file that the classifier learns from; "
            "examples/rt_polarity/prepare.py writes it"
        )
    return probabilities(train_classifier(metadata["classifier_data"]), [prompt + response])[0]
