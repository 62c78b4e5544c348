"""``commands_worker.py`` whose PPO runs write ``<run.dir>/recorded_<step>.pt`` after every step.

That is the experience, and the weights of actor and critic.
"""

from __future__ import annotations

import runpy

import torch

from hetero_ppo.trainers.ppo_evaluation import Evaluator
from hetero_ppo.types import Experience

dump_rollout = Evaluator.dump_rollout


def record(self: Evaluator, step: int, experience: Experience) -> None:
    """Stand in for ``Evaluator.dump_rollout``, which every rank calls at the end of every step."""
    dump_rollout(self, step, experience)
    weights = {}
    for name in ("actor", "critic"):
        role = self.maker.engines[name]
        with role.on_device(phase="eval"):
            weights[name] = {weight: tensor.clone() for weight, tensor in role.stream_weights()}
    if self.run_info.is_writer:
        tensors = {name: value for name, value in vars(experience).items() if isinstance(value, torch.Tensor)}
        scores = {"scores": experience.scores.outcome}
        masks = {"mask": experience.response_mask, "responses": experience.rollout.response_mask}
        torch.save({**tensors, **scores, **masks, **weights}, self.run_info.dir / f"recorded_{step}.pt")


if __name__ == "__main__":
    Evaluator.dump_rollout = record
    runpy.run_module("tests.helpers.commands_worker", run_name="__main__")
