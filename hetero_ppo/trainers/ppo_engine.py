"""The rollout engine's turns on the device that it shares with the roles.

The servers belong to rank 0 and take memory of every rank's device: all ranks make room before they wake, and no rank goes on
before they sleep. Without a device (vLLM on a CPU) there is nothing to wait for.

On GPUs a server that dies is restarted in an engine turn alone, when the roles are off the device and no rank's memory moves: vLLM does
not start where its share is not free, nor where another process gives memory back while it profiles. A server that dies in a role's turn
is noted, and restarted in the next engine turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hetero_ppo.config.schema import RolloutConfig
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.errors import RunError
from hetero_ppo.observability.trace import ENGINE, Args
from hetero_ppo.rollout.engine import VllmEngine
from hetero_ppo.rollout.megatron import MegatronEngine
from hetero_ppo.rollout.replay import ReplayEngine
from hetero_ppo.rollout.servers.server import sleeps
from megatron_bridge import platform
from megatron_bridge.platform.copies import describe_device_memory, release_cached_memory

RolloutEngine = VllmEngine | ReplayEngine | MegatronEngine


@dataclass
class EngineTurns:
    """Wakes and sleeps the engine between the roles' turns. Every method is collective over the world."""

    engine: RolloutEngine | None  # on rank 0, and None on the others; on every rank where the actor generates itself
    device: SharedDevice
    config: RolloutConfig

    def __post_init__(self) -> None:
        self._allow_restarts(False)

    @property
    def needs_first_sync(self) -> bool:
        """True when the servers started without weights."""
        return self._shares_memory

    @property
    def _shares_memory(self) -> bool:
        return sleeps(self.config, cuda=platform.HAS_CUDA)

    @contextlib.contextmanager
    def generating(self) -> Iterator[RolloutEngine | None]:
        """The device is the engine's, but for what the schedule keeps there during a rollout."""
        self.wake()
        yield self.engine
        self.sleep()

    def wake(self, *, shared: bool = False) -> None:
        """Roles leave, the engine takes its weights and KV cache; servers that died since the last time are restarted.

        Args:
            shared: roles compute while the engine generates; servers that die meanwhile need ``restarter``.
        """
        self._allow_restarts(False)
        self.device.engine_turn("rollout")
        self._make_room()
        if self.engine is not None:
            with self.at_work("wake"), self._naming_memory():
                self.engine.wake()
        self._restart_down()
        self._allow_restarts(not shared)

    @property
    def restarter(self) -> Callable[[], None] | None:
        """Restarts servers between the forwards of a shared engine turn; collective. None where the engine has no servers."""
        return self._restart_down if self.engine is None or isinstance(self.engine, VllmEngine) else None

    def _restart_down(self) -> None:
        """Restart servers that are down, with all ranks' memory given to the driver and nothing on its way."""
        if not platform.HAS_CUDA:  # they were restarted at once
            return
        num_down = torch.tensor([self.engine.num_down if isinstance(self.engine, VllmEngine) else 0])
        if dist.get_world_size() > 1:
            dist.broadcast(num_down, 0)
        if not num_down:
            return
        self.device.engine_turn("rollout", ahead=False)
        release_cached_memory()
        dist.barrier()
        if isinstance(self.engine, VllmEngine):
            with self.at_work("restart"), self._naming_memory():
                self.engine.restart_down()
        dist.barrier()  # until then no rank gives memory back

    def _allow_restarts(self, allowed: bool) -> None:
        """Say whether a server that dies from now on is restarted at once; on a CPU it always is."""
        if platform.HAS_CUDA and isinstance(self.engine, VllmEngine):
            self.engine.may_restart(allowed)

    def wake_for_sync(self) -> None:
        """Inside the actor's turn: the engine takes the memory of its weights alone, to be written anew."""
        self._allow_restarts(False)
        self.device.wait_for_room()
        self._make_room()
        if self.engine is not None:
            with self.at_work("wake for weights"), self._naming_memory():
                self.engine.wake(weights_only=True)

    def sleep(self) -> None:
        """The engine gives its memory back."""
        self._allow_restarts(False)  # a server that died has given it back
        if self.engine is not None:
            with self.at_work("sleep"):
                self.engine.sleep()
        self._barrier()

    def sync_metrics(self) -> dict[str, float]:
        """Seconds and rate of the last weight sync, what its proofs took, and how servers shared the requests since the one before.

        Nothing on ranks without the engine.
        """
        if self.engine is None or self.engine.last_sync is None:
            return {}
        shares = self.engine.share_metrics() if isinstance(self.engine, VllmEngine) else {}
        return self.engine.last_sync.metrics() | shares

    def at_work(self, name: str) -> contextlib.AbstractContextManager[Args]:
        """The engine's lane of the trace."""
        return self.device.trace.span(ENGINE, name)

    def _make_room(self) -> None:
        """Give what the roles have left to the driver, on all ranks: the engine is another process, and takes it from there."""
        if self._shares_memory:
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
        if self._shares_memory:
            dist.barrier()
