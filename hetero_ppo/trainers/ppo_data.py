"""The prompts of a PPO run, and what a step asks of the generator."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hetero_ppo.config.derived import PROBE_TOKENS
from hetero_ppo.config.schema import AlgorithmConfig, PpoConfig, SamplingConfig
from hetero_ppo.data.chat_template import TextEncoder, load_text_encoder
from hetero_ppo.data.collate import collate_prompts
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.node_share import node_files
from hetero_ppo.data.prompts import PromptExample, load_prompts
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.partial import PartialBuffer
from hetero_ppo.trainers.run import Run
from hetero_ppo.trainers.samplers import make_sampler
from hetero_ppo.types import PromptBatch

log = logging.getLogger(__name__)


@dataclass
class PpoData:
    """Prompts of the run, the same on every rank."""

    encoder: TextEncoder
    train: Dataset[PromptExample]
    held_out: Dataset[PromptExample] | None
    eval_prompts: PromptBatch | None
    sampler: ResumableSampler
    waiting: PartialBuffer  # with over-sampling: prompts that were read, and their partial responses

    @property
    def datasets(self) -> list[Dataset[PromptExample]]:
        """Training prompts, and the held-out ones where there are any."""
        return [self.train, *([] if self.held_out is None else [self.held_out])]

    def next_prompts(self) -> PromptBatch:
        """Return the next ``algorithm.rollout_batch_size`` prompts, over all ranks."""
        return collate_prompts([self.train.examples[row] for row in self.sampler.next_global_batch()])

    def next_request(
        self, algorithm: AlgorithmConfig, sampling: SamplingConfig, num_responses: int, seed: int
    ) -> GenerationRequest:
        """Take the prompts of the next PPO step, and return what it asks of the generator.

        Args:
            algorithm: The ``algorithm`` section, for the responses to a prompt.
            sampling: How responses are sampled.
            num_responses: Number of responses of a step, over all ranks.
            seed: Seed of the request.
        """
        n = algorithm.samples_per_prompt
        if self.waiting.over_sampling == 1.0:
            return GenerationRequest(self.next_prompts(), sampling, n=n, seed=seed)
        prompts = self.waiting.take(num_responses, self.next_prompts, n)
        partial = self.waiting.partial[: len(prompts)]
        return GenerationRequest(prompts, sampling, n=1, seed=seed, partial=partial, num_needed=num_responses)

    @property
    def probe_ids(self) -> list[int]:
        """Token ids of the first prompts, at least two, for the check after a weight sync."""
        ids: list[int] = []
        for example in self.train.examples:
            ids += example.prompt_ids
            if len(ids) >= 2:
                break
        return ids[:PROBE_TOKENS]


def load_data(config: PpoConfig, run: Run) -> PpoData:
    """Read, template and tokenise the prompts.

    Raises:
        ValueError: A file, a row or the template cannot be used.
    """
    encoder = load_text_encoder(config.actor.model, config.data, "actor", run.beginning.started_at)
    log.info(encoder.describe_ends())
    run.keep_template(encoder)
    train = load_prompts(config.data.train, config.data, encoder, node_files(run.world))
    log.info(train.report.describe())
    held_out = eval_prompts = None
    if config.data.eval is not None:
        held_out = load_prompts(config.data.eval, config.data, encoder, node_files(run.world))
        log.info(held_out.report.describe())
        eval_prompts = collate_prompts(held_out.examples)
    batch_size = config.algorithm.rollout_batch_size
    sampler = make_sampler(train, batch_size, seed=config.run.seed, shuffle=config.data.shuffle)
    return PpoData(encoder, train, held_out, eval_prompts, sampler, PartialBuffer(config.rollout.over_sampling))
