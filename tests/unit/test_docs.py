"""The documentation is of this code: its metrics are those that runs log."""

from __future__ import annotations

import metrics_page

from hetero_ppo.config.load import load_config
from hetero_ppo.step.phases import step_phases


def test_every_metric_of_the_code_is_explained() -> None:
    assert metrics_page.names_of_code() - metrics_page.names_of_page() == set()


def test_the_page_explains_no_metric_that_the_code_lacks() -> None:
    assert metrics_page.names_of_page() - metrics_page.names_of_code() == set()


def test_every_phase_of_a_ppo_step_is_explained() -> None:
    config = load_config(metrics_page.ROOT / "configs" / "ppo" / "word_sort.yaml", [])
    inner = {phase.split("/")[1] for phase in metrics_page.phases_of_page() if "/" in phase}
    top = {phase for phase in metrics_page.phases_of_page() if "/" not in phase}
    assert {phase.name for phase in step_phases(config)} <= inner | top
    assert metrics_page.phases_of_code() - inner == top - {"total"}
