"""The movie-review example: its split, its classifier and its measures of diversity."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from hetero_ppo.config.load import load_draft
from hetero_ppo.config.schema import ModelConfig, PreferenceDataConfig, PromptDataConfig, SftDataConfig
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.prompts import load_prompts
from hetero_ppo.data.sft import load_sft
from hetero_ppo.data.tokenizer_training import train_tokenizer
from hetero_ppo.reward.function_worker import load_function

EXAMPLE = Path(__file__).parents[2] / "examples" / "rt_polarity"
sys.path.insert(0, str(EXAMPLE))
try:
    import evaluate
    import classifier
    import prepare
finally:
    sys.path.remove(str(EXAMPLE))

SIZES = prepare.Sizes(classifier=40, held_out=10, pairs_per_review=2)


def reviews(rng: random.Random, adjectives: list[str], count: int) -> list[str]:
    """Make distinct sentences whose adjectives show their class."""
    nouns = [f"{first}{second}" for first in ("film", "plot", "cast", "score") for second in "abcdefghij"]
    found: dict[str, None] = {}
    while len(found) < count:
        one, other = rng.sample(nouns, 2)
        found[f"the {one} and the {other} are {rng.choice(adjectives)} and {rng.choice(adjectives)} ."] = None
    return list(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the form of the real ones: trailing space, a copy, a short line, a line of both classes."""
    path = tmp_path_factory.mktemp("reviews")
    rng = random.Random(0)
    for name, adjectives in (("positive", ["lovely", "great", "warm"]), ("negative", ["dull", "awful", "silly"])):
        lines = [f"{line} " for line in reviews(rng, adjectives, 80)]
        extra = [lines[0], "too short .", "a line of both classes is in neither of the two ."]
        (path / f"{name}.txt").write_text("\n".join([*lines, *extra]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setattr(prepare, "Sizes", lambda: SIZES)
    prepare.main(["--data", str(folder), "--out", str(out), "--seed", "3"])
    patch.undo()
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_reading_cleans_the_lines(folder: Path) -> None:
    found = prepare.read_reviews(folder / "positive.txt")
    assert len(found) == 81  # without the copy and the short line
    assert all(line == line.strip() for line in found)


def test_the_parts_share_no_review(data: Path) -> None:
    policy = {row["prompt"] + row["completion"] for row in rows(data / "sft.jsonl")}
    held_out = {row["prompt"] + row["completion"] for row in rows(data / "sft_eval.jsonl")}
    seen = {row["text"] for row in rows(data / prepare.CLASSIFIER_FILE)}
    assert (len(policy), len(held_out), len(seen)) == (60, 20, 80)
    assert not policy & held_out and not policy & seen and not held_out & seen
    assert {row["text"] for row in rows(data / prepare.CLASSIFIER_TEST_FILE)} == held_out
    for name, part in (("preference", policy), ("preference_eval", held_out)):
        pairs = rows(data / f"{name}.jsonl")
        assert {row[side] for row in pairs for side in ("chosen", "rejected")} == part
    assert not any("both classes" in text for text in policy | held_out | seen)


def test_prompts_are_the_first_words_of_their_part(data: Path) -> None:
    for prompts, part in (("prompts", "sft"), ("heldout", "sft_eval")):
        found = [row["prompt"] for row in rows(data / f"{prompts}.jsonl")]
        assert found == [row["prompt"] for row in rows(data / f"{part}.jsonl")]
        assert all(len(prompt.split()) == prepare.PROMPT_WORDS for prompt in found)


def test_pairs_put_a_positive_review_first(data: Path, folder: Path) -> None:
    positive = set(prepare.read_reviews(folder / "positive.txt"))
    pairs = rows(data / "preference.jsonl")
    assert len(pairs) == 2 * 30
    assert all(row["chosen"] in positive and row["rejected"] not in positive for row in pairs)


def test_the_same_seed_gives_the_same_split(folder: Path) -> None:
    good, bad = (prepare.read_reviews(folder / f"{name}.txt") for name in ("positive", "negative"))
    first, second, other = (prepare.make_rows(seed, good, bad, SIZES, "classifier.jsonl") for seed in (1, 1, 2))
    assert first == second
    assert first["sft.jsonl"] != other["sft.jsonl"]


def test_too_few_reviews_are_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="80 reviews of a class are too few: 2000 are for the classifier"):
        prepare.main(["--data", str(folder), "--out", str(tmp_path)])
    (tmp_path / "positive.txt").write_text("short\n")
    with pytest.raises(ValueError, match="no line has 7 or more words"):
        prepare.read_reviews(tmp_path / "positive.txt")


def test_the_trainers_read_the_data_without_a_template(data: Path, tmp_path: Path) -> None:
    texts = [row["prompt"] + row["completion"] for row in rows(data / "sft.jsonl")]
    train_tokenizer(texts, 400, tmp_path / "tokenizer")
    sft_data, prompt_data, pair_data = (
        section(train="unused", apply_chat_template=False)
        for section in (SftDataConfig, PromptDataConfig, PreferenceDataConfig)
    )
    encoder = load_text_encoder(ModelConfig(path=str(tmp_path / "tokenizer")), sft_data, "actor")
    sft = load_sft(str(data / "sft.jsonl"), sft_data, encoder)
    prompts = load_prompts(str(data / "prompts.jsonl"), prompt_data, encoder)
    for example, prompt, text in zip(sft.examples, prompts.examples, texts, strict=True):
        # The policy continues a prompt exactly as SFT showed it, and the pieces are those of the whole review.
        assert example.token_ids[: example.answer_spans[0][0]] == prompt.prompt_ids
        assert example.token_ids == [*encoder.encode([text])[0], encoder.eos_token_id]
    pairs = load_preferences(str(data / "preference.jsonl"), pair_data, encoder)
    assert all(pair.prompt_length == 0 for pair in pairs.examples)


def test_the_classifier_tells_the_classes_apart(data: Path) -> None:
    path = str(data / prepare.CLASSIFIER_FILE)
    trained = classifier.train_classifier(path)
    assert classifier.train_classifier(path) is trained
    real = classifier.read_sentences(str(data / prepare.CLASSIFIER_TEST_FILE))
    assert classifier.accuracy(trained, real) > 0.9
    flipped = classifier.Sentences(real.texts, [not positive for positive in real.positive])
    assert classifier.accuracy(trained, flipped) < 0.1
    metadata = rows(data / "heldout.jsonl")[0]["metadata"]
    good = classifier.positive("the filma and the", " plotb are lovely and great .", None, metadata)
    bad = classifier.positive("the filma and the", " plotb are dull and awful .", None, metadata)
    assert 0 <= bad < 0.5 < good <= 1


def test_the_config_finds_the_classifier(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    spec = load_draft("configs/ppo/rt_polarity.yaml", []).node.train.eval_function
    function = load_function(spec, "train.eval_function")
    metadata = rows(data / "heldout.jsonl")[0]["metadata"]
    assert function("the plotb", " is lovely .", None, metadata) > 0.5


def test_the_classifier_says_what_it_learns_from() -> None:
    with pytest.raises(ValueError, match="has no metadata.classifier_data"):
        classifier.positive("the film", " is fine", None, {})


def test_distinct_n_by_hand() -> None:
    texts = ["a b a b", "a b c"]
    assert evaluate.distinct(texts, 1) == pytest.approx(3 / 7)
    assert evaluate.distinct(texts, 2) == pytest.approx(3 / 5)  # ab ba ab, ab bc
    assert evaluate.distinct(["a"], 3) == 0.0
    assert evaluate.most_frequent(["a b c a b c", "x a b c", "x y z"], 3) == ("a b c", pytest.approx(2 / 3))
    assert evaluate.most_frequent(["a"], 3) == ("", 0.0)


def test_a_collapsed_policy_shows(data: Path) -> None:
    trained = classifier.train_classifier(str(data / prepare.CLASSIFIER_FILE))
    real = classifier.read_sentences(str(data / prepare.CLASSIFIER_TEST_FILE)).texts
    collapsed = ["the film is lovely and great ."] * len(real)
    honest = evaluate.describe_reviews("real", trained, real, 0.0)
    hacked = evaluate.describe_reviews("one phrase", trained, collapsed, 0.0)
    assert hacked.positive_share == 1.0 > honest.positive_share
    assert hacked.repeated == 1.0 and honest.repeated == 0.0
    assert hacked.top_3_share == 1.0 and hacked.distinct_3 < honest.distinct_3
