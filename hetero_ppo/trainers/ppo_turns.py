"""The generator's turns on the device that it shares with the roles.

The servers belong to rank 0 and take memory of every rank's device: all ranks make room before they wake, and no rank goes on
before they sleep. Without a device (vLLM on a CPU) there is nothing to wait for.

On GPUs a server that dies is restarted in a turn of the generator alone, when the roles are off the device and no rank's memory moves: vLLM
does not start where its share is not free, nor where another process gives memory back while it profiles. A server that dies in a role's
turn is noted, and restarted in the generator's next turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.errors import RunError
from hetero_ppo.observability.trace import GENERATOR, Args
from hetero_ppo.rollout.generator import Generator
from megatron_bridge import platform
from megatron_bridge.platform.copies import describe_device_memory, release_cached_memory


@dataclass
class GeneratorTurns:
    """Wakes and sleeps the generator between the roles' turns. Every method is collective over the world."""

    generator: Generator
    device: SharedDevice
    world: dist.ProcessGroup  # all ranks
    generator_rank: int  # rank that owns the generator

    def __post_init__(self) -> None:
        self._allow_restarts(False)

    @property
    def needs_first_sync(self) -> bool:
        """True when the generator gets its first weights by a sync like all others, so that it can drop them."""
        return self.generator.capabilities.can_sleep

    @contextlib.contextmanager
    def generating(self) -> Iterator[Generator]:
        """Give the device to the generator, but for what the schedule keeps there during a rollout."""
        self.wake()
        yield self.generator
        self.sleep()

    def wake(self, *, shared: bool = False) -> None:
        """Move the roles off the device, and let the generator take its weights and KV cache. Restart the servers that have died.

        Args:
            shared: Whether roles compute while the generator works; servers that die meanwhile need ``restarter``.
        """
        self._allow_restarts(False)
        self.device.generator_turn("rollout")
        self._make_room()
        with self.at_work("wake"), self._naming_memory():
            self.generator.wake()
        self._restart_down()
        self._allow_restarts(not shared)

    @property
    def restarter(self) -> Callable[[], None] | None:
        """Function that restarts servers between the forwards of a shared turn; collective. None without servers."""
        return self._restart_down if self.generator.capabilities.has_servers else None

    def _restart_down(self) -> None:
        """Restart servers that are down, with all ranks' memory given to the driver and nothing on its way."""
        if not (platform.HAS_CUDA and self.generator.capabilities.has_servers):  # on a CPU they were restarted at once
            return
        num_down = torch.tensor([self.generator.num_down])
        if self.world.size() > 1:
            dist.broadcast(num_down, self.generator_rank, group=self.world)
        if not num_down:
            return
        self.device.generator_turn("rollout", ahead=False)
        release_cached_memory()
        dist.barrier(self.world)
        with self.at_work("restart"), self._naming_memory():
            self.generator.restart_down()
        dist.barrier(self.world)  # until then no rank gives memory back

    def _allow_restarts(self, allowed: bool) -> None:
        """Set whether a server that dies from now on is restarted at once; on a CPU it always is."""
        if platform.HAS_CUDA:
            self.generator.may_restart(allowed)

    def wake_for_sync(self) -> None:
        """Let the generator take the memory of its weights alone, inside the actor's turn, so that a sync can write them."""
        self._allow_restarts(False)
        self.device.wait_for_room()
        self._make_room()
        with self.at_work("wake for weights"), self._naming_memory():
            self.generator.wake(weights_only=True)

    def sleep(self) -> None:
        """Let the generator give its memory back."""
        self._allow_restarts(False)  # a server that died has given it back
        with self.at_work("sleep"):
            self.generator.sleep()
        self._barrier()

    def check_probe(self, token_ids: list[int], log_probs: list[float]) -> dict[str, float]:
        """Return how far the generator's log-probs of the probe prompt are from the trainer's, on the generator's rank.

        Args:
            token_ids: Probe prompt of L tokens.
            log_probs: [L - 1] log-probs by the trainer.
        """
        if not self.generator.is_here:
            return {}
        with self.at_work("probe prompt"):
            return {"rollout/probe_log_prob_diff": self.generator.verify_sync(token_ids, log_probs)}

    def at_work(self, name: str) -> contextlib.AbstractContextManager[Args]:
        """Return a span of the generator's lane in the trace."""
        return self.device.trace.span(GENERATOR, name)

    def _make_room(self) -> None:
        """Give what the roles have left to the driver, on all ranks: a server is another process, and takes it from there."""
        if self.generator.capabilities.can_sleep:
            release_cached_memory()
        self._barrier()

    @contextlib.contextmanager
    def _naming_memory(self) -> Iterator[None]:
        """Add to an error what rank 0's device has left."""
        try:
            yield
        except RunError as error:
            memory = describe_device_memory()
            if not memory:
                raise
            raise RunError(f"{error}; {memory}. See rollout.gpu_memory_utilization and `hetero-ppo plan`") from error

    def _barrier(self) -> None:
        if self.generator.capabilities.can_sleep:
            dist.barrier(self.world)
