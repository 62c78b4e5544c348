"""Supervised fine-tuning: negative log-likelihood of the answers."""

from __future__ import annotations

import logging

import torch
from torch.nn.functional import pad

from hetero_ppo.config.derived import derive_supervised
from hetero_ppo.config.schema import SftConfig
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.collate import collate_sft
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.node_share import node_files
from hetero_ppo.data.sampler import sequential_batches
from hetero_ppo.data.sft import SftExample, load_sft
from hetero_ppo.engines.loss_terms import LossTerm, TrainStepResult, num_loss_tokens
from hetero_ppo.engines.losses import sft_loss_fn
from hetero_ppo.engines.outputs import log_probs_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.step.roles import run_roles
from hetero_ppo.trainers.roles import build_role
from hetero_ppo.trainers.run import Run
from hetero_ppo.trainers.run_inputs import model_inputs, text_inputs
from hetero_ppo.trainers.samplers import make_sampler
from hetero_ppo.trainers.supervised import SupervisedTrainer
from hetero_ppo.types import AnswerInputs

log = logging.getLogger(__name__)


class SftTrainer(SupervisedTrainer):
    """Trains the actor on prompts and their answers."""

    def __init__(self, config: SftConfig, run: Run) -> None:
        encoder = load_text_encoder(config.actor.model, config.data, "actor", run.beginning.started_at)
        log.info(encoder.describe_ends())
        run.keep_template(encoder)
        self.data = load_sft(config.data.train, config.data, encoder, node_files(run.world))
        log.info(self.data.report.describe())
        self.held_out: Dataset[SftExample] | None = None
        if config.data.eval is not None:
            self.held_out = load_sft(config.data.eval, config.data, encoder, node_files(run.world))
            log.info(self.held_out.report.describe())
        run.check_inputs(
            text_inputs(config, run.resume, encoder, self.data, {}) + model_inputs(run_roles(config), run.world)
        )
        batching = derive_supervised(config, run.world_size, len(self.data))
        log.info(batching.describe())
        engine = build_role(
            run, "actor", config.actor, lambda role: TrainEngine("actor", role, "lm", batching.total_steps)
        )
        batch_size = config.train.global_batch_size
        sampler = make_sampler(self.data, batch_size, seed=config.run.seed, shuffle=config.data.shuffle)
        super().__init__(run, config.run, config.train, config.checkpoint, batching, sampler, engine, encoder)
        self.loss_fn = sft_loss_fn(engine.model.vocab_size, engine.groups, engine.model.vocab_parts)

    def step(self, rows: list[int]) -> TrainStepResult:
        """Take one optimizer step on these examples."""
        batch = collate_sft([self.data.examples[row] for row in rows])
        inputs, all_rows = AnswerInputs(batch.loss_mask), range(len(rows))
        parts = self.engine.microbatches(batch.token_ids, batch.sequence_lengths, inputs, all_rows)
        return self.engine.train_step([LossTerm(parts, self.loss_fn, num_loss_tokens(inputs, all_rows))])

    def evaluate(self) -> dict[str, float]:
        """Return the mean negative log-likelihood of the held-out answers' tokens."""
        if self.held_out is None:
            return {}
        engine = self.engine.model
        output = log_probs_output(
            temperature=1.0, vocab_size=engine.vocab_size, groups=engine.groups, num_parts=engine.vocab_parts
        )
        total, count = torch.zeros((), dtype=torch.float64), 0
        batches = sequential_batches(len(self.held_out), self.train.global_batch_size, 0, 1)
        for number, rows in enumerate(batches):
            if number == self.train.eval_batches:
                break
            batch = collate_sft([self.held_out.examples[row] for row in rows])
            output_mask = pad(batch.loss_mask, (0, 1))
            log_probs = engine.forward(batch.token_ids, batch.sequence_lengths, output, output_mask)
            total -= log_probs[batch.loss_mask].double().sum()
            count += int(batch.loss_mask.sum())
        return {"eval/loss": float(total) / count}
