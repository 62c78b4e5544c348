"""The size of a chunk of a rollout: a number of the configuration, or what a sweep of the generator finds."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from hetero_ppo.config.derived import PpoBatching, running_batch
from hetero_ppo.config.schema import PipelineConfig, RolloutConfig
from hetero_ppo.data.collate import collate_prompts
from hetero_ppo.rollout.sweep import find_running_batch
from hetero_ppo.trainers.ppo_data import PpoData
from hetero_ppo.trainers.ppo_turns import GeneratorTurns

log = logging.getLogger(__name__)


def find_chunk_size(
    pipeline: PipelineConfig,
    rollout: RolloutConfig,
    world: dist.ProcessGroup,
    data: PpoData,
    batching: PpoBatching,
    turns: GeneratorTurns,
) -> int:
    """Return the number of responses of a chunk. Collective over the world.

    Args:
        pipeline: The ``pipeline`` section; a ``chunk_size`` of 0 asks for the sweep.
        rollout: The ``rollout`` section.
        world: Group of all ranks.
        data: Prompts of the run, which the sweep answers.
        batching: Batch arithmetic of the run.
        turns: Turns of the generator on the device.
    """
    if pipeline.chunk_size != 0:
        return batching.chunk_size
    found = torch.zeros(1, dtype=torch.int64)
    with turns.generating() as generator:
        if generator.is_here:
            largest = running_batch(rollout, world.size())
            prompts = collate_prompts(data.train.examples[:largest])
            sampling, budget_s = rollout.sampling, pipeline.sweep_s
            result = find_running_batch(generator, prompts, sampling, largest=largest, budget_s=budget_s)
            log.info(result.table())
            found[0] = min(result.batch, batching.responses_per_step)
    if world.size() > 1:
        dist.broadcast(found, turns.generator_rank, group=world)
    return int(found)
