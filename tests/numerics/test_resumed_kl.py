"""A KL coefficient that the configuration has changed is applied; an unchanged one goes on from the checkpoint's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hetero_ppo.algorithms.kl import build_kl_controller
from hetero_ppo.config.schema import KlConfig, KlController
from hetero_ppo.trainers import ppo_state


@pytest.mark.parametrize(
    ("new", "changed", "coef"),
    [
        (KlConfig(controller=KlController.adaptive, coef=0.05), set(), 0.07),
        (KlConfig(controller=KlController.adaptive, coef=0.2), {"algorithm.kl.coef"}, 0.2),
        (KlConfig(controller=KlController.fixed, coef=0.05), {"algorithm.kl.controller"}, 0.05),
    ],
)
def test_which_coefficient_a_run_goes_on_with(
    new: KlConfig, changed: set[str], coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_state, "load_sampler", lambda sampler, state, run: None)
    takes = SimpleNamespace(load_state_dict=lambda state: None)
    controller = build_kl_controller(new)
    state = {name: {} for name in (*ppo_state.STATE_NAMES, "health")} | {
        "kl_controller": {"controller": "adaptive", "coef": 0.07}
    }
    data = SimpleNamespace(waiting=takes, sampler=takes)
    maker = SimpleNamespace(kl_controller=controller, score_moments=takes)
    run = SimpleNamespace(has_changed=lambda name: name in changed)
    ppo_state.load_trainer_state(state, data, maker, takes, run)
    assert controller.coef == coef
