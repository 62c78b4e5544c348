from __future__ import annotations

import argparse
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from hetero_ppo.cli import report as report_command
from hetero_ppo.config.schema import RunConfig
from hetero_ppo.observability.gantt import draw_gantt, idle_text
from hetero_ppo.observability.figures import _binned, _smoothed, group_figures, phase_means
from hetero_ppo.observability.metrics import MetricsLogger
from hetero_ppo.observability.records import Series, read_run
from hetero_ppo.observability.report import build_report
from hetero_ppo.observability.trace import COPY_IN, TRAINER, WAIT, TraceRecorder
from hetero_ppo.observability.summary import format_summary, matched_samples, read_comparison
from hetero_ppo.types import StepMetrics

VOID_TAGS = {"meta", "link", "br", "img", "hr", "input"}


class StructureCheck(HTMLParser):
    """Every tag is closed, in order; collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID_TAGS:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "action")]
        self.fetched += [v or "" for name, v in attrs if name.endswith("href") and not (v or "").startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()


def write_evaluation(path: Path, accuracy: float | None, responses: list[str]) -> None:
    samples = [
        {"prompt": f"Sort <{i}> & co", "response": response, "label": "a, b", "score": 0.5}
        for i, response in enumerate(responses)
    ]
    path.write_text(
        json.dumps(
            {
                "accuracy": accuracy,
                "greedy_accuracy": accuracy,
                "reward": -0.25,
                "kl": 1.5,
                "response_length": 12.0,
                "num_prompts": 200,
                "samples": samples,
            }
        )
    )


@pytest.fixture
def ppo_run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "ppo"
    with MetricsLogger(run_dir, RunConfig(dir=str(run_dir), tensorboard=False), is_writer=True) as logger:
        for step in range(1, 41):
            values = {"reward/mean": step / 10, "kl/reference": 0.1 * step, "actor/pg_loss": 0.01, "odd/metric": 1.0}
            if step == 7:
                values["reward/mean"] = math.nan
            logger.log(StepMetrics(step, values, {"rollout": 1.0, "update": 2.0, "update/actor": 1.5, "total": 4.0}))
    (run_dir / "config.yaml").write_text("kind: ppo\nrun:\n  seed: 7\n")
    write_evaluation(run_dir / "eval_before.json", 0.3, ["a, b", "b, a", "c"])
    write_evaluation(run_dir / "eval_after.json", 0.8, ["a, b", "a, b", "a, b"])
    return run_dir


def test_report_is_one_well_formed_page_that_fetches_nothing(ppo_run: Path, tmp_path: Path) -> None:
    out = build_report([ppo_run], tmp_path / "deep" / "r.html", title="<Demo>")
    page = out.read_text()
    check = StructureCheck()
    check.feed(page)
    assert check.open == []
    assert check.fetched == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert "&lt;Demo&gt;" in page and "<Demo>" not in page
    assert "Sort &lt;1&gt; &amp; co" in page  # data cannot break the page
    for text in ("Reward", "KL to the reference", "Accuracy", "Losses", "Seconds per step, by phase", "odd/metric"):
        assert text in page
    assert "seed: 7" in page
    assert "+50.0 points" in page
    assert "1 value(s) not finite (gaps in the curves): reward/mean" in page


def test_ids_of_figures_on_one_page_differ(ppo_run: Path) -> None:
    figures = dict(group_figures(read_run(ppo_run)))
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in figures.values()]
    assert all(clips) and len(set.union(*clips)) == sum(len(ids) for ids in clips)


def test_groups_without_metrics_are_left_out(ppo_run: Path) -> None:
    titles = [title for title, _ in group_figures(read_run(ppo_run))]
    expected = ["Reward", "KL to the reference", "Accuracy", "Response length", "Losses", "Seconds per step, by phase"]
    assert titles == expected


def test_a_repeated_step_counts_once_with_its_later_record(tmp_path: Path) -> None:
    for values in ([1.0, 2.0, 3.0], [20.0]):
        with MetricsLogger(tmp_path, RunConfig(dir=str(tmp_path), tensorboard=False), is_writer=True) as logger:
            for step, value in enumerate(values, start=1 if len(values) == 3 else 2):
                logger.log(StepMetrics(step, {"train/loss": value}, {"total": value}))
    run = read_run(tmp_path)
    assert run.series["train/loss"] == Series([1, 2, 3], [1.0, 20.0, 3.0])
    assert run.seconds_total == 24.0
    assert run.kind == "run" and run.num_steps == 3


def test_the_ledger_becomes_a_picture(ppo_run: Path) -> None:
    gib = 2**30
    phases = {"values": {"critic": {"params": gib}}, "train_actor": {"actor": {"params": gib, "moments": 4 * gib}}}
    (ppo_run / "memory_ledger.json").write_text(json.dumps({"phases": phases}))
    figures = dict(group_figures(read_run(ppo_run)))
    svg = figures["On the device, by phase (roles, rank 0)"]
    ElementTree.fromstring(svg)
    for text in ("values", "train_actor", "moments", "all roles staying", "GiB"):
        assert text in svg
    (ppo_run / "memory_ledger.json").unlink()


def test_phase_means_leave_children_out(ppo_run: Path) -> None:
    assert phase_means(read_run(ppo_run)) == [("update", 2.0), ("rollout", 1.0), ("other", 1.0)]


def test_null_is_a_gap(ppo_run: Path) -> None:
    run = read_run(ppo_run)
    assert math.isnan(run.series["reward/mean"].values[6])
    assert run.num_non_finite == 1


def test_binning_and_smoothing() -> None:
    steps, values = _binned(Series(list(range(10)), [float(i) for i in range(9)] + [math.nan]), 5)
    np.testing.assert_allclose(steps, [0.5, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_allclose(values, [0.5, 2.5, 4.5, 6.5, 8.0])
    line = np.linspace(3.0, -2.0, 60)
    line[20] = math.nan
    np.testing.assert_allclose(_smoothed(line), line, atol=1e-9)  # a straight line stays, with its gap
    assert set(_smoothed(np.full(50, 1e-3))) == {1e-3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"step": 1, "time": 1, "metrics": {}, "seconds": {}}\n{"step": 2\n',
            r"metrics\.jsonl, line 2: not a metrics",
        ),
        ('{"step": 1, "time": 1, "seconds": {}}\n', r"metrics\.jsonl, line 1: the field 'metrics' is missing"),
        ("", r"metrics\.jsonl: empty"),
    ],
)
def test_malformed_metrics_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        build_report([tmp_path / "nowhere"], tmp_path / "r.html")


def test_malformed_evaluation_names_the_field(ppo_run: Path) -> None:
    (ppo_run / "eval_after.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(ValueError, match=r"eval_after\.json: the field 'greedy_accuracy' is missing"):
        read_run(ppo_run)


def test_summary_shows_table_samples_and_paths(ppo_run: Path) -> None:
    (ppo_run / "hf").mkdir()
    text = format_summary(ppo_run, ppo_run / "missing.html")
    lines = text.splitlines()
    assert "200" in lines[0]
    (accuracy,) = [line for line in lines if "accuracy, sampled" in line]
    assert accuracy.split()[-6:] == ["30.0", "%", "80.0", "%", "+50.0", "points"]
    assert sum(line.startswith("Sample ") for line in lines) == 3
    assert lines.index("  before: b, a   [score 0.50]") < lines.index("  before: a, b   [score 0.50]")  # changed first
    assert str(ppo_run / "hf") in text and "metrics.jsonl" in text
    assert "missing.html" not in text


def test_summary_without_a_check_leaves_accuracy_out(ppo_run: Path) -> None:
    write_evaluation(ppo_run / "eval_before.json", None, ["x"])
    write_evaluation(ppo_run / "eval_after.json", None, ["y"])
    text = format_summary(ppo_run)
    assert "accuracy" not in text and "mean reward" in text


def test_samples_are_matched_by_prompt(ppo_run: Path) -> None:
    before, after = read_comparison(ppo_run)
    pairs = matched_samples(before, after, limit=10)
    assert len(pairs) == 3 and all(old.prompt == new.prompt for old, new in pairs)


def test_summary_of_a_run_without_evaluations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_before\.json: no such file.*PPO run"):
        format_summary(tmp_path)


def test_command_writes_the_report_and_prints_the_summary(ppo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    report_command.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["report", "--run", str(ppo_run), "--summary"])
    args.run(args)
    assert (ppo_run / "report.html").exists()
    out = capsys.readouterr().out
    assert "+50.0 points" in out and str(ppo_run / "report.html") in out


def test_a_metric_is_labelled_by_the_kind_of_run(ppo_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "rm"
    with MetricsLogger(run_dir, RunConfig(dir=str(run_dir), tensorboard=False), is_writer=True) as logger:
        for step in (1, 2):
            logger.log(StepMetrics(step, {"rm/accuracy": 0.5, "rm/loss": 0.6, "eval/accuracy": 0.7, "eval/loss": 0.5}))
    rm = dict(group_figures(read_run(run_dir)))
    assert "held-out pairs" in rm["Accuracy"] and "sampled" not in rm["Accuracy"]
    assert "held-out pairs" in rm["Losses"]
    ppo = dict(group_figures(read_run(ppo_run)))
    assert "held-out, sampled" in ppo["Accuracy"] and "pairs" not in ppo["Accuracy"]


def traced_step(run_dir: Path, step: int) -> None:
    """Write the trace of a step of ten seconds, of which the actor works for four."""
    now = iter([0.0, 10.0])
    trace = TraceRecorder(run_dir / "trace", every=1, clock=lambda: next(now))
    trace.begin(step)
    trace.add(TRAINER, "train_actor", 0.0, 10.0)
    trace.add(TRAINER, WAIT, 0.0, 2.0)
    trace.add("actor", "train_actor", 2.0, 6.0)
    trace.add("actor", "optimizer step", 5.0, 6.0)
    trace.add(COPY_IN, "actor params", 0.0, 2.5, role="actor", kind="params", bytes=8, blocks=1)
    assert trace.end() is not None


def test_report_shows_the_newest_traced_step(ppo_run: Path, tmp_path: Path) -> None:
    assert 'class="card gantt' not in build_report([ppo_run], tmp_path / "r.html").read_text()
    for step in (2, 50):
        traced_step(ppo_run, step)
    page = build_report([ppo_run], tmp_path / "r.html").read_text()
    assert "Step 50 on rank 0" in page and "Step 2 on" not in page
    (svg,) = re.findall(r'class="card gantt wide">.*?(<svg.*?</svg>)', page, flags=re.DOTALL)
    ElementTree.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert [text for text in texts if text.startswith("idle")] == ["idle 20 %", "idle 60 %", "idle 75 %"]
    assert {TRAINER, "actor", COPY_IN, "train_actor"} <= set(texts)


def test_bars_are_where_the_spans_are(ppo_run: Path) -> None:
    traced_step(ppo_run, 1)
    trace = read_run(ppo_run).trace
    assert trace is not None
    (axes,) = draw_gantt(trace).axes
    boxes = [collection.get_paths()[0].get_extents() for collection in axes.collections]
    spans = [(round(box.x0, 6), round(box.x1, 6), round((box.y0 + box.y1) / 2)) for box in boxes]
    # By row: the trainer's phase and its wait, the actor's turn and the optimizer's step, the copy.
    assert spans == [(0, 10, 0), (0, 2, 0), (2, 6, 1), (5, 6, 1), (0, 2.5, 2)]
    assert axes.get_xlim() == (0, 10)


def test_idle_is_said_in_whole_percent() -> None:
    shares = {0.0: "0 %", 0.001: "<1 %", 0.634: "63 %", 0.999: ">99 %", 1.0: "100 %"}
    assert {share: idle_text(share).removeprefix("idle ") for share in shares} == shares
