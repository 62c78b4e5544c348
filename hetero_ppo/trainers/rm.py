"""Reward-model training: Bradley-Terry on preference pairs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hetero_ppo.algorithms.losses import bradley_terry_loss, mean_metrics
from hetero_ppo.config.derived import derive_supervised
from hetero_ppo.config.schema import RmConfig
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.collate import collate_preferences
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.node_share import node_files
from hetero_ppo.data.preference import PreferenceExample, load_preferences
from hetero_ppo.data.sampler import sequential_batches
from hetero_ppo.engines.loss_terms import LossTerm, TrainStepResult
from hetero_ppo.engines.losses import reward_loss_fn
from hetero_ppo.engines.microbatches import sequence_ends
from hetero_ppo.engines.outputs import scores_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.reward.golden import GOLDEN_FILE, make_golden
from hetero_ppo.step.roles import run_roles
from hetero_ppo.trainers.roles import build_role
from hetero_ppo.trainers.run import Run
from hetero_ppo.trainers.run_inputs import model_inputs, text_inputs
from hetero_ppo.trainers.samplers import make_sampler
from hetero_ppo.trainers.supervised import SupervisedTrainer

log = logging.getLogger(__name__)


class RewardModelTrainer(SupervisedTrainer):
    """Trains the reward model to score the chosen answer above the rejected one."""

    def __init__(self, config: RmConfig, run: Run) -> None:
        encoder = load_text_encoder(config.reward.model, config.data, "reward", run.beginning.started_at)
        log.info(encoder.describe_ends())
        run.keep_template(encoder)
        self.data = load_preferences(config.data.train, config.data, encoder, node_files(run.world))
        log.info(self.data.report.describe())
        self.held_out: Dataset[PreferenceExample] | None = None
        if config.data.eval is not None:
            self.held_out = load_preferences(config.data.eval, config.data, encoder, node_files(run.world))
            log.info(self.held_out.report.describe())
        run.check_inputs(
            text_inputs(config, run.resume, encoder, self.data, {}) + model_inputs(run_roles(config), run.world)
        )
        batching = derive_supervised(config, run.world_size, len(self.data))
        log.info(batching.describe())
        engine = build_role(
            run, "reward", config.reward, lambda role: TrainEngine("reward", role, "score", batching.total_steps)
        )
        batch_size = config.train.global_batch_size
        sampler = make_sampler(self.data, batch_size, seed=config.run.seed, shuffle=config.data.shuffle)
        super().__init__(run, config.run, config.train, config.checkpoint, batching, sampler, engine, encoder)
        self.loss = config.loss
        self.loss_fn = reward_loss_fn(config.loss)

    def step(self, rows: list[int]) -> TrainStepResult:
        """Take one optimizer step on these pairs."""
        batch = collate_preferences([self.data.examples[row] for row in rows])
        return self.engine.train_step([LossTerm(self.engine.pair_microbatches(batch), self.loss_fn, len(rows))])

    def weight_files(self) -> dict[str, str]:
        """Return the golden scores of held-out pairs, or of training pairs where there are none. A plain forward has no golden scores."""
        if not self.engine.model.bridge.aligned:
            return {}
        return {GOLDEN_FILE: make_golden(self.engine.model, (self.held_out or self.data).examples).text()}

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the held-out pairs. A tie counts as wrong."""
        if self.held_out is None:
            return {}
        chosen, rejected = [], []
        batches = sequential_batches(len(self.held_out), self.train.global_batch_size, 0, 1)
        for number, rows in enumerate(batches):
            if number == self.train.eval_batches:
                break
            batch = collate_preferences([self.held_out.examples[row] for row in rows])
            chosen.append(self._scores(batch.chosen_ids, batch.chosen_lengths))
            rejected.append(self._scores(batch.rejected_ids, batch.rejected_lengths))
        loss = bradley_terry_loss(torch.cat(chosen), torch.cat(rejected), self.loss.margin, self.loss.score_l2, 1.0)
        return {
            f"eval/{name.removeprefix('rm/')}": value
            for name, value in mean_metrics(loss.metric_sums, loss.count).items()
        }

    def _scores(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.engine.model.forward(token_ids, lengths, scores_output, sequence_ends(lengths, token_ids.shape[1]))
