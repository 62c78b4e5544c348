"""Summary of a PPO run for the terminal: before and after, sample answers, and the paths of its files."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from hetero_ppo.observability.sinks.jsonl import METRICS_FILE
from hetero_ppo.observability.records import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    EvaluationRecord,
    Sample,
    read_evaluation,
)
from hetero_ppo.table import render_table

#: Number of sample answers that are shown.
NUM_SAMPLES = 3

REPORT_FILE = "report.html"
EXPORT_FOLDER = "hf"


def comparison_rows(before: EvaluationRecord, after: EvaluationRecord) -> list[tuple[str, str, str, str]]:
    """Return rows (measure, before, after, change) of text. Accuracies are left out if there is no held-out check."""
    rows: list[tuple[str, str, str, str]] = []
    accuracies = (
        ("accuracy, sampled answers", before.accuracy, after.accuracy),
        ("accuracy, greedy answers", before.greedy_accuracy, after.greedy_accuracy),
    )
    for name, old, new in accuracies:
        if old is not None and new is not None:
            rows.append((name, f"{100 * old:.1f} %", f"{100 * new:.1f} %", f"{100 * (new - old):+.1f} points"))
    plain = (
        ("mean reward", before.reward, after.reward, ".3f"),
        ("KL to the reference, nats per response", before.kl, after.kl, ".3f"),
        ("response length, tokens", before.response_length, after.response_length, ".1f"),
    )
    rows.extend((name, f"{old:{spec}}", f"{new:{spec}}", f"{new - old:+{spec}}") for name, old, new, spec in plain)
    return rows


def matched_samples(
    before: EvaluationRecord, after: EvaluationRecord, limit: int = NUM_SAMPLES
) -> list[tuple[Sample, Sample]]:
    """Return pairs of samples that answer the same prompt; pairs whose answer changed come first.

    Raises:
        ValueError: No prompt is in both evaluations.
    """
    later = {sample.prompt: sample for sample in after.samples}
    pairs = [(sample, later[sample.prompt]) for sample in before.samples if sample.prompt in later]
    if not pairs:
        raise ValueError(f"{EVAL_BEFORE_FILE} and {EVAL_AFTER_FILE} have no sample prompt in common")
    return sorted(pairs, key=lambda pair: pair[0].response == pair[1].response)[:limit]


def read_comparison(run_dir: Path) -> tuple[EvaluationRecord, EvaluationRecord]:
    """Read the evaluations before the first and after the last PPO step.

    Raises:
        ValueError: One of them is missing.
    """
    before, after = read_evaluation(run_dir / EVAL_BEFORE_FILE), read_evaluation(run_dir / EVAL_AFTER_FILE)
    if before is None or after is None:
        missing = EVAL_BEFORE_FILE if before is None else EVAL_AFTER_FILE
        raise ValueError(
            f"{run_dir / missing}: no such file. A finished PPO run with data.eval writes it; is this a PPO run's folder?"
        )
    return before, after


def format_summary(run_dir: Path, report: Path | None = None) -> str:
    """Return the text that ends the quick start: table, sample answers, paths.

    Args:
        run_dir: Folder of a finished PPO run.
        report: HTML file of the run, if there is one.

    Raises:
        ValueError: The run has no evaluation before or after, or a malformed one.
    """
    before, after = read_comparison(run_dir)
    lines = [f"Held-out prompts: {after.num_prompts}. Before and after PPO:", ""]
    rows = [("", "before", "after", "change"), *comparison_rows(before, after)]
    lines.append(textwrap.indent(render_table(rows, "lrrr", rule=True), "  "))
    for number, (old, new) in enumerate(matched_samples(before, after), start=1):
        lines += ["", *_sample_lines(number, old, new)]
    lines += ["", *_path_lines(run_dir, report)]
    return "\n".join(lines)


def _sample_lines(number: int, old: Sample, new: Sample) -> list[str]:
    lines = _wrapped(f"Sample {number}: ", old.prompt)
    if old.label is not None:
        lines += _wrapped("   right: ", old.label)
    lines += _wrapped("  before: ", f"{old.response.strip() or '(empty)'}   [{old.score_text}]")
    return lines + _wrapped("   after: ", f"{new.response.strip() or '(empty)'}   [{new.score_text}]")


def _wrapped(head: str, text: Any) -> list[str]:
    r"""Wrap ``text`` to lines of 110 columns after ``head``. Its own line breaks are shown as ``\n``."""
    shown = str(text).strip().replace("\n", "\\n")
    return textwrap.wrap(shown, width=110, initial_indent=head, subsequent_indent=" " * len(head)) or [head]


def _path_lines(run_dir: Path, report: Path | None) -> list[str]:
    paths = [
        ("exported model", run_dir / EXPORT_FOLDER),
        ("metrics", run_dir / METRICS_FILE),
        ("TensorBoard", run_dir / "tensorboard"),
    ]
    if report is not None:
        paths.append(("report", report))
    return render_table([(f"{name}:", str(path)) for name, path in paths if path.exists()], "ll").splitlines()
