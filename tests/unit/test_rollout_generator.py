"""The null generator of ranks without one, the fields of a request, and the capabilities of each generator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.helpers.one_rank import ONE_RANK
import torch
from tests.helpers.generator_requests import prompts_of
from torch import Tensor

from hetero_ppo.config.schema import ResidencyConfig, RolloutConfig, SamplingConfig
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator, NullGenerator
from hetero_ppo.rollout.replay import ReplayGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.trainers import ppo_turns
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.types import Response

SERVERS = VllmGenerator.capabilities_of(RolloutConfig(), cuda=True)


def request(num_prompts: int = 2, **fields: object) -> GenerationRequest:
    values = {"n": 3, "seed": 0, **fields}
    return GenerationRequest(prompts_of([[5]] * num_prompts), SamplingConfig(max_tokens=7), **values)  # type: ignore[arg-type]


def test_each_generator_says_what_it_can_do() -> None:
    assert SERVERS == Capabilities(can_resume=True, can_sleep=True, has_servers=True, needs_weight_sync=True)
    on_cpu = VllmGenerator.capabilities_of(RolloutConfig(), cuda=False)
    assert not on_cpu.can_sleep and VllmGenerator.capabilities_of(RolloutConfig(sleep=True), cuda=False).can_sleep
    assert ReplayGenerator.capabilities == Capabilities(is_recorded=True)


@pytest.mark.parametrize("needs_weight_sync", [False, True])
def test_a_rank_without_the_generator_reads_the_weights_where_the_generator_does(needs_weight_sync: bool) -> None:
    """Making the tensors is collective: either all ranks read them, or none does."""
    read: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(3):
            read.append(number)
            yield "w", torch.zeros(1)

    NullGenerator(Capabilities(needs_weight_sync=needs_weight_sync)).sync_weights(stream(), "step1")
    assert read == ([0, 1, 2] if needs_weight_sync else [])


def test_a_rank_without_the_generator_has_nothing_to_do() -> None:
    with NullGenerator(SERVERS) as generator:
        generator.wake()
        generator.may_restart(False)
        generator.restart_down()
        generator.sleep()
        assert not generator.is_here and generator.num_down == 0 and generator.sync_metrics() == {}
        with pytest.raises(AssertionError, match="this rank has no generator"):
            generator.generate(request())
        for use in (lambda: generator.verify_sync([5, 6], [0.0]), lambda: generator.weights_key):
            with pytest.raises(AssertionError, match="NullGenerator"):
                use()


def test_turns_follow_the_capabilities_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Barriers and the first sync are for generators that sleep, restarts for those with servers."""
    barriers: list[str] = []
    monkeypatch.setattr(ppo_turns.dist, "barrier", lambda group: barriers.append("barrier"))
    monkeypatch.setattr(ppo_turns, "release_cached_memory", lambda: barriers.append("release"))
    device = SharedDevice(ResidencyConfig(), ppo_phases(reward_models=[], actor_scores_old=True))
    found = {}
    for name, capabilities in {"servers": SERVERS, "recorded": ReplayGenerator.capabilities}.items():
        generator: Generator = NullGenerator(capabilities)
        turns = GeneratorTurns(generator, device, ONE_RANK, 0)
        with turns.generating() as given:
            assert given is generator
        found[name] = (turns.needs_first_sync, turns.restarter is not None, barriers.copy())
        assert turns.check_probe([5, 6], [0.0]) == {}
        barriers.clear()
    device.close()
    assert found == {"servers": (True, True, ["release", "barrier", "barrier"]), "recorded": (False, False, [])}


def test_a_request_counts_places_and_rows() -> None:
    assert (request().num_places, request().num_rows, request(num_needed=4).num_rows) == (6, 6, 4)
    assert request().limit_of(1) == 7 and request(max_tokens=[2, 5]).limit_of(1) == 5


def test_complete_responses_join_the_partial_ones() -> None:
    first, second = Response([1], [-0.5], "abort", "step0"), Response([2], [-0.5], "stop", "step1")
    assert request().with_complete([]) == request()
    assert request().with_complete([(4, second)]).partial == [None] * 4 + [second, None]
    partial: list[Response | None] = [first, first, *[None] * 4]
    assert request(partial=partial).with_complete([(1, second)]).partial == [first, second, *[None] * 4]
    assert partial[1] is first, "the request that was given stays as it is"
