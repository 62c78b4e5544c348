"""Write one HTML file about a training: curves, a traced step, before and after, sample answers, configuration.

Everything is inline, so the file can be mailed and opens without a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from hetero_ppo.disk import writing
from hetero_ppo.observability.figures import group_figures, phase_means
from hetero_ppo.observability.gantt import gantt_svg
from hetero_ppo.observability.records import EvaluationRecord, RunRecord, Sample, read_run
from hetero_ppo.observability.summary import comparison_rows, matched_samples

KIND_TITLES = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO", "run": "Run"}

#: Samples shown before and after.
NUM_SAMPLES = 6

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head>
<body><main>
<header><h1>$title</h1><p class="quiet">$subtitle</p></header>
$body
</main></body></html>
"""
)

STYLE = """
:root { --ink: #1d2430; --quiet: #667085; --line: #e3e7ed; --page: #f5f6f8; --card: #fff; --good: #0b7a5f;
  --good-page: #e4f5ef; --chip: #eef0f4; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 14px; display: flex; gap: 12px; align-items: baseline; flex-wrap: wrap; }
h3 { font-size: 14px; margin: 0 0 8px; }
.quiet { color: var(--quiet); font-size: 13.5px; font-weight: 400; margin: 4px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 22px; }
.tile .name { color: var(--quiet); font-size: 13px; }
.tile .value { font-size: 26px; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile .from { color: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
.figures { columns: 440px 2; column-gap: 14px; }
.figures .card { break-inside: avoid; margin-bottom: 14px; }
.figures svg, .gantt svg { display: block; width: 100%; height: auto; }
.gantt { margin-bottom: 14px; }
.gantt svg { min-width: 760px; }
.figures svg text, .gantt svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-size: 13px; font-weight: 500; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
th.number, td.number { text-align: right; }
.wide { overflow-x: auto; }
.sample { margin-top: 14px; }
.sample .prompt { font-weight: 550; white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-top: 10px; }
@media (max-width: 720px) { .answers { grid-template-columns: 1fr; } }
.answer { background: var(--page); border-radius: 8px; padding: 10px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.answer.right { background: var(--good-page); }
.answer .head { display: flex; justify-content: space-between; font: 12.5px/1.4 -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; color: var(--quiet); margin-bottom: 6px; }
.chip { background: var(--chip); border-radius: 9px; padding: 0 8px; }
.right .chip { background: var(--good); color: #fff; }
.warn { background: #fff4e5; border-color: #f3d4a5; margin: 0 0 14px; }
details { margin-top: 10px; }
.figures + details { margin-top: 14px; }
details.card { padding: 9px 18px; }
summary { cursor: pointer; color: var(--quiet); font-size: 13.5px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  margin: 10px 0 0; }
"""


def build_report(run_paths: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write the report of one or more runs, in the given order, and return its path.

    Args:
        run_paths: Run folders, or their metrics.jsonl files.
        out: HTML file to write; its folder is created.
        title: Heading; None: the kinds of the runs.

    Raises:
        ValueError: A run has no metrics, or malformed files.
    """
    if not run_paths:
        raise ValueError("a report needs at least one run folder")
    runs = [read_run(Path(path)) for path in run_paths]
    heading = title or " → ".join(dict.fromkeys(KIND_TITLES.get(run.kind, run.kind) for run in runs))
    seconds = sum(run.seconds_total for run in runs)
    subtitle = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {_duration(seconds)} of training"
    compared = [run for run in runs if run.before is not None and run.after is not None]
    body = [_comparison_section(run, named=len(compared) > 1) for run in compared]
    body.append(_overview(runs))
    body += [_run_section(run) for run in runs]
    page = PAGE.substitute(title=escape(heading), subtitle=escape(subtitle), style=STYLE, body="\n".join(body))
    with writing(out, "report", len(page), "choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    return out


def _comparison_section(run: RunRecord, named: bool) -> str:
    assert run.before is not None and run.after is not None
    name = f'<h2>Before and after PPO<span class="quiet">{escape(str(run.dir))}</span></h2>' if named else ""
    tiles = "".join(_tile(run.before, run.after))
    rows = comparison_rows(run.before, run.after)
    table = _table(("", "before PPO", "after PPO", "change"), rows)
    samples = "".join(_sample(*pair) for pair in matched_samples(run.before, run.after, NUM_SAMPLES))
    return f"""<section>{name}<div class="tiles">{tiles}</div>
<h2>Held-out evaluation<span class="quiet">{run.after.num_prompts} prompts</span></h2><div class="card">{table}</div>
<h2>Sample answers<span class="quiet">the same held-out prompts before and after PPO</span></h2>{samples}</section>"""


def _tile(before: EvaluationRecord, after: EvaluationRecord) -> list[str]:
    return [
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="value">{escape(new)}</div>'
        f'<div class="from">was {escape(old)} ({escape(change)})</div></div>'
        for name, old, new, change in comparison_rows(before, after)
        if "greedy" not in name
    ]


def _sample(before: Sample, after: Sample) -> str:
    right = "" if before.label is None else f'<div class="quiet">right answer: {escape(str(before.label))}</div>'
    answers = _answer("before", before) + _answer("after", after)
    return (
        f'<div class="card sample"><div class="prompt">{escape(before.prompt.strip())}</div>{right}'
        f'<div class="answers">{answers}</div></div>'
    )


def _answer(name: str, sample: Sample) -> str:
    is_right = sample.label is not None and sample.response.strip() == str(sample.label).strip()
    return (
        f'<div class="answer{" right" if is_right else ""}"><div class="head"><span>{name}</span>'
        f'<span class="chip">{sample.score_text}</span></div>{escape(sample.response.strip() or "(empty)")}</div>'
    )


def _overview(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        per_step = run.seconds_total / max(1, run.num_steps)
        kind = KIND_TITLES.get(run.kind, run.kind)
        rows.append((kind, str(run.dir), str(run.num_steps), _duration(run.seconds_total), f"{per_step:.2f}"))
    table = _table(("", "folder", "steps", "time", "seconds per step"), rows, first_number=2)
    return f'<h2>Runs</h2><div class="card wide">{table}</div>'


def _run_section(run: RunRecord) -> str:
    figures = "".join(f'<div class="card"><h3>{escape(title)}</h3>{svg}</div>' for title, svg in group_figures(run))
    warning = ""
    if run.num_non_finite:
        names = [name for name, series in run.series.items() if any(not math.isfinite(v) for v in series.values)]
        warning = (
            f'<div class="card warn">{run.num_non_finite} value(s) not finite (gaps in the curves): '
            f"{escape(', '.join(names))}</div>"
        )
    return f"""<section><h2>{escape(KIND_TITLES.get(run.kind, run.kind))}<span class="quiet">{escape(str(run.dir))}</span></h2>
{warning}{_gantt(run)}<div class="figures">{figures}</div>{_phase_details(run)}{_notes(run)}{_metric_details(run)}{_config(run)}</section>"""


def _gantt(run: RunRecord) -> str:
    if run.trace is None:
        return ""
    picture = gantt_svg(run.trace, f"{run.dir}/gantt")
    title = f"Step {run.trace.step} on rank {run.trace.rank}: what ran when, and how long each lane was idle"
    return f'<div class="card gantt wide"><h3>{escape(title)}</h3>{picture}</div>'


def _phase_details(run: RunRecord) -> str:
    if not run.seconds:
        return ""
    means = phase_means(run)
    whole = sum(value for _, value in means) or 1.0
    rows = [(name, f"{value:.3f}", f"{100 * value / whole:.1f} %") for name, value in means]
    table = _table(("phase", "mean seconds per step", "share"), rows)
    return f'<details class="card"><summary>Seconds by phase</summary><div class="wide">{table}</div></details>'


def _notes(run: RunRecord) -> str:
    if not run.notes:
        return ""
    rows = [(str(step), note) for step, note in run.notes]
    table = _table(("step", "note"), rows, first_number=2)
    return f'<details class="card" open><summary>Notes</summary><div class="wide">{table}</div></details>'


def _metric_details(run: RunRecord) -> str:
    rows = []
    for name in sorted(run.series):
        finite = [value for value in run.series[name].values if math.isfinite(value)]
        if finite:
            figures = (finite[0], finite[-1], min(finite), max(finite))
            rows.append((name, *(f"{value:.5g}" for value in figures)))
        else:
            rows.append((name, "not finite", "not finite", "", ""))
    table = _table(("metric", "first", "last", "lowest", "highest"), rows)
    return f'<details class="card"><summary>All {len(rows)} metrics</summary><div class="wide">{table}</div></details>'


def _config(run: RunRecord) -> str:
    if run.config_text is None:
        return ""
    return (
        f'<details class="card"><summary>Configuration</summary><pre>{escape(run.config_text.strip())}</pre></details>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], first_number: int = 1) -> str:
    """Return an HTML table; columns from ``first_number`` on are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column >= first_number else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
