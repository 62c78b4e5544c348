"""Write the data of the demo, whose task is to put a few English words in alphabetical order.

Two kinds of people made the data, as in a real RLHF project. *Demonstrators* write the SFT answers in a hurry: most of
them look at the first letter alone and leave words that share it in the prompt's order, and some slip (two neighbours
swapped, a word left out, written twice, or replaced by another). *Labellers* compare two answers with care and are wrong
a few times in a hundred. A policy trained on the demonstrations picks up the demonstrators' habits; the preference pairs
carry the knowledge that PPO can correct them with.

    python examples/word_sort/make_data.py --out runs/word_sort/data --seed 0

No set of words appears in two files, so no training stage sees a held-out set in any order.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Three words for each of eight initials, so that most prompts have words that the first letter alone does not order.
WORDS = (
    *("bean", "bell", "bird"),
    *("cake", "card", "cave"),
    *("farm", "fern", "film"),
    *("hand", "hare", "harp"),
    *("lake", "lamp", "leaf"),
    *("map", "mask", "milk"),
    *("pail", "park", "pear"),
    *("tail", "tent", "tile"),
)

QUESTIONS = (
    "Put these words in alphabetical order: {words}",
    "Sort these words from A to Z: {words}",
    "List these words alphabetically: {words}",
)

#: After the colon every word of an answer follows a space, as in the prompt: it is the same token in both.
ANSWER = "Sorted: {words}"

#: Kind of slip -> its relative frequency.
SLIPS = {"swap": 2, "drop": 1, "repeat": 4, "foreign": 8}


@dataclass(frozen=True)
class Recipe:
    """Number of rows of each file, and how often its writers are wrong."""

    min_words: int = 5
    max_words: int = 6
    sft_rows: int = 13_000
    sft_eval_rows: int = 256
    preference_rows: int = 20_000
    preference_eval_rows: int = 512
    prompt_rows: int = 13_000
    heldout_rows: int = 200
    hasty_rate: float = 0.85  # share of demonstrations ordered by the first letter alone
    slip_rate: float = 0.05  # share of demonstrations with a slip (on top)
    label_noise: float = 0.03  # share of training pairs whose labels are exchanged


@dataclass(frozen=True)
class Task:
    """One prompt: a question and the distinct words in it, in its order."""

    question: str
    words: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.question.format(words=" ".join(self.words))

    @property
    def label(self) -> str:
        return answer_text(sorted(self.words))


def answer_text(words: Sequence[str]) -> str:
    """Return an answer with the words in this order."""
    return ANSWER.format(words=" ".join(words))


def draw_tasks(rng: random.Random, rows: int, recipe: Recipe, taken: set[frozenset[str]]) -> list[Task]:
    """Draw ``rows`` tasks whose sets of words are not in ``taken``, and add them there."""
    tasks: list[Task] = []
    while len(tasks) < rows:
        words = tuple(rng.sample(WORDS, rng.randint(recipe.min_words, recipe.max_words)))
        if frozenset(words) not in taken:
            taken.add(frozenset(words))
            tasks.append(Task(rng.choice(QUESTIONS), words))
    return tasks


def hasty_order(words: Sequence[str]) -> list[str]:
    """Sort by the first letter; words that share it stay in the given order."""
    return sorted(words, key=lambda word: word[0])


def draw_slip(rng: random.Random) -> str:
    """Draw a kind of slip by its frequency."""
    return rng.choices(list(SLIPS), weights=list(SLIPS.values()))[0]


def slip(rng: random.Random, answer: Sequence[str], kind: str) -> list[str]:
    """Return ``answer`` with one slip of the given kind; the result always differs from it.

    A repeated word is additional, or takes the place of its neighbour. A foreign word has the initial of the word that it
    replaces half of the time, and is mostly sorted in, so that neither the answer's length nor its order shows it.
    """
    words = list(answer)
    place = rng.randrange(len(words))
    neighbour = rng.randrange(1, len(words))
    if kind == "swap":
        words[neighbour - 1], words[neighbour] = words[neighbour], words[neighbour - 1]
    elif kind == "drop":
        del words[place]
    elif kind == "repeat" and rng.random() < 0.5:
        words.insert(place, words[place])
    elif kind == "repeat":
        words[neighbour - 1 : neighbour + 1] = [rng.choice(words[neighbour - 1 : neighbour + 1])] * 2
    elif kind == "foreign":
        others = [word for word in WORDS if word not in words]
        alike = [word for word in others if word[0] == words[place][0]]
        words[place] = rng.choice(alike if alike and rng.random() < 0.5 else others)
        words = sorted(words) if rng.random() < 0.8 else words
    else:
        raise ValueError(f"unknown kind of slip {kind!r}; known: {', '.join(SLIPS)}")
    return words


def demonstrate(rng: random.Random, task: Task, recipe: Recipe) -> str:
    """Draw a demonstrator's answer: right, hasty, or with a slip."""
    answer = hasty_order(task.words) if rng.random() < recipe.hasty_rate else sorted(task.words)
    if rng.random() < recipe.slip_rate:
        answer = slip(rng, answer, draw_slip(rng))
    return answer_text(answer)


def mistaken(rng: random.Random, task: Task) -> str:
    """Draw a wrong answer, as demonstrators give them: hasty where that is wrong, or with one to three slips."""
    right = sorted(task.words)
    hasty = hasty_order(task.words)
    if hasty != right and rng.random() < 0.4:
        return answer_text(hasty)
    answer = right
    # A later slip can undo an earlier one.
    while answer == right:
        answer = right
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            answer = slip(rng, answer, draw_slip(rng))
    return answer_text(answer)


def sft_row(rng: random.Random, task: Task, recipe: Recipe) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": task.prompt},
            {"role": "assistant", "content": demonstrate(rng, task, recipe)},
        ]
    }


def preference_row(rng: random.Random, task: Task, label_noise: float) -> dict[str, object]:
    chosen, rejected = task.label, mistaken(rng, task)
    if rng.random() < label_noise:
        chosen, rejected = rejected, chosen
    return {"prompt": task.prompt, "chosen": chosen, "rejected": rejected}


def prompt_row(task: Task) -> dict[str, object]:
    return {"prompt": task.prompt, "label": task.label, "metadata": {"words": list(task.words)}}


def make_rows(seed: int, recipe: Recipe) -> dict[str, list[dict[str, object]]]:
    """Make the rows of every file; the same seed gives the same rows. No two rows of any files share their set of words."""
    rng = random.Random(seed)
    taken: set[frozenset[str]] = set()

    def tasks(rows: int) -> list[Task]:
        return draw_tasks(rng, rows, recipe, taken)

    files = {
        "heldout.jsonl": [prompt_row(task) for task in tasks(recipe.heldout_rows)],
        "sft.jsonl": [sft_row(rng, task, recipe) for task in tasks(recipe.sft_rows)],
        "sft_eval.jsonl": [sft_row(rng, task, recipe) for task in tasks(recipe.sft_eval_rows)],
        "preference.jsonl": [preference_row(rng, task, recipe.label_noise) for task in tasks(recipe.preference_rows)],
        "preference_eval.jsonl": [preference_row(rng, task, 0.0) for task in tasks(recipe.preference_eval_rows)],
        "prompts.jsonl": [prompt_row(task) for task in tasks(recipe.prompt_rows)],
    }
    assert len(taken) == sum(len(rows) for rows in files.values()), "two rows share a set of words"
    return files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(args.seed, Recipe()).items():
        path = args.out / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
