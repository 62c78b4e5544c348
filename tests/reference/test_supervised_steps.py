"""Steps of SFT and of a reward model are those of ``supervised_steps.py``: in one process, with DP 2 and with TP 2."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.helpers.chain import read_metrics
from tests.reference.configurations import LAYOUTS, NUM_STEPS, SUPERVISED, folder
from tests.reference.recorded import read_config
from tests.reference.supervised_steps import Supervised
from tests.reference.test_ppo_step import METRICS, WEIGHTS
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", SUPERVISED)
def test_metrics_and_weights(kind: str, reference_runs: Path) -> None:
    reference = Supervised(read_config(folder(reference_runs, kind, "one process")))
    before = {name: weight.detach().clone() for name, weight in reference.trained.model.named_parameters()}
    expected = {step: reference.step() for step in range(1, NUM_STEPS + 1)}
    expected[NUM_STEPS] |= reference.evaluate()
    weights = {name: weight.detach() for name, weight in reference.trained.model.named_parameters()}
    for layout in LAYOUTS:
        run_dir = folder(reference_runs, kind, layout)
        metrics = read_metrics(run_dir)
        for step, values in expected.items():
            assert metrics[step].keys() == values.keys()
            for name, value in values.items():
                assert metrics[step][name] == pytest.approx(value, **METRICS), (layout, step, name)
        ours = load_file(run_dir / "hf" / "model.safetensors")
        distance = math.hypot(*(float((ours[name] - weights[name]).norm()) for name in ours))
        update = math.hypot(*(float((weights[name] - before[name]).norm()) for name in ours))
        assert distance <= WEIGHTS * update, (layout, distance / update)
