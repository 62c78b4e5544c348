"""The generator with vLLM: HTTP servers that answer prompts and get new weights after every step."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hetero_ppo.config.derived import keeps_weight_files, weight_transfer
from hetero_ppo.config.schema import Dtype, RolloutConfig, WeightTransfer
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.compute_mode import check_compute_mode
from hetero_ppo.rollout.checks import check_prompts, check_request, probe_difference
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator
from hetero_ppo.network import LOOPBACK
from hetero_ppo.rollout.servers.nodes import AnyServer, Cluster, remote_servers
from hetero_ppo.private_dir import PrivateDir
from hetero_ppo.rollout.requests import Requests
from hetero_ppo.rollout.beam_search import BeamSearch, Expand, Hypothesis, run_search
from hetero_ppo.rollout.servers.pool import Member, ServerPool, gather_all
from hetero_ppo.rollout.servers.server import MAX_LOG_PROBS, VllmServer, server_spec, sleeps
from hetero_ppo.rollout.weights.bucket import PinnedStaging
from hetero_ppo.rollout.weights.targets import POLICY, check_target
from hetero_ppo.rollout.weights.transports import weight_transport
from hetero_ppo.rollout.weights.weight_sync import SyncStats
from hetero_ppo.rollout.weights.weight_version import Packer, check_room_for_another, remove_files, take_weights
from hetero_ppo.types import OnResponse, Response

T = TypeVar("T")


class ServersState(Enum):
    """Memory that the servers hold on their devices."""

    awake = "awake"  # weights and KV cache
    weights = "without its KV cache"
    asleep = "asleep"


def check_devices(config: RolloutConfig, num_here: int, num_devices: int | None) -> None:
    """Raise ValueError when the servers of this node need more GPUs than it has.

    Args:
        config: The ``rollout`` section.
        num_here: Number of servers on this node.
        num_devices: Number of GPUs of this node. None: it computes on its CPU.
    """
    needed = num_here * config.tensor_parallel
    if num_devices is None and config.weight_transfer is WeightTransfer.cuda_ipc:
        raise ValueError(
            "rollout.weight_transfer=cuda_ipc: there is no GPU here; use auto, shared_memory or collective"
        )
    if num_devices is None and config.batch_invariant:
        raise ValueError("rollout.batch_invariant=True: it is for GPUs, and there is none here; leave it out")
    if num_devices is not None and needed > num_devices:
        raise ValueError(
            f"rollout.num_servers={config.num_servers} with rollout.tensor_parallel={config.tensor_parallel} needs {needed} GPUs on "
            f"this node, for {num_here} servers; it has {num_devices}"
        )


class VllmGenerator(Generator):
    """vLLM servers, on this node and on others. Leaving the context ends the servers, and so does any error except ValueError.

    Use it from one rank of the run. ``generate`` and ``sync_weights`` block. They may be called from different threads.

    Args:
        config: The ``rollout`` section, with a number of servers.
        model_path: Hugging Face folder of the model.
        dtype: The actor's dtype, which the servers have where ``config.dtype`` is None.
        run_dir: Folder of the run. Server logs go to ``<run_dir>/rollout/server_<i>.log``.
        max_model_len: Largest number of tokens, prompt and response together.
        eos_token_ids: Token ids that end a response, unless ``sampling.ignore_eos``.
        initial_version: Label of the weights in ``model_path``. None: the folder has only config.json, so the servers start with
            random weights and refuse to generate before the first sync.
        tokenizer_path: Hugging Face folder of the tokenizer, for stop strings. None: ``sampling.stop`` is refused.
        cluster: Nodes of the run, if other nodes have servers. None: all servers are on this node.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        dtype: Dtype,
        run_dir: Path,
        max_model_len: int,
        eos_token_ids: list[int],
        initial_version: str | None = "initial",
        tokenizer_path: str | None = None,
        cluster: Cluster | None = None,
    ):
        self.config = config
        self.dtype = dtype if config.dtype is None else config.dtype
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self._cluster = cluster
        # A run has replaced null by a number (derived.num_servers). A generator without a run has one server.
        self._num_here = (config.num_servers or 1) if cluster is None else cluster.counts[cluster.node]
        self._spec = server_spec(
            config,
            self._num_here,
            model_path=model_path,
            dtype=self.dtype,
            max_model_len=max_model_len,
            load_weights=initial_version is not None,
            tokenizer_path=tokenizer_path,
        )
        # Taken here, because start() may run in another thread, whose current device is the first one.
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._spec.cuda else torch.device("cpu")
        self._staging = PinnedStaging()
        self._transfer = weight_transfer(config, one_node=cluster is None)
        self._log_dir = Path(run_dir).resolve() / "rollout"
        self._initial_version = initial_version
        self.last_sync: SyncStats | None = None  # None before the first sync
        self._num_syncs = 0
        self.capabilities = self.capabilities_of(config, cuda=self._spec.cuda)
        self._state = ServersState.awake
        self._weights_dropped = False  # the servers' memory of the weights has no valid contents
        self._pool: ServerPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._private_dir: PrivateDir | None = None

    @staticmethod
    def capabilities_of(config: RolloutConfig, *, cuda: bool) -> Capabilities:
        """Return the capabilities of vLLM's servers.

        Args:
            config: The ``rollout`` section.
            cuda: Whether the servers compute on GPUs.
        """
        can_sleep = sleeps(config, cuda=cuda)
        return Capabilities(can_resume=True, can_sleep=can_sleep, has_servers=True, needs_weight_sync=True)

    @property
    def version(self) -> str | None:
        """Label of the servers' weights. None: they are random."""
        return self._started_pool().version

    @property
    def weights_key(self) -> str:
        """Name of the servers' weights by their content. Before the first sync it is that of the folder that they come from."""
        weights = self._started_pool().weights
        if weights is None:
            return f"{self._spec.model_path} {self.version}"
        return hashlib.sha256(json.dumps(sorted(weights.checksums.items())).encode()).hexdigest()

    @property
    def servers(self) -> list[AnyServer]:
        """All servers of the run."""
        return [member.server for member in self._started_pool().members]

    @property
    def num_down(self) -> int:
        """Number of servers that died while they could not be restarted."""
        pool = self._started_pool()
        return len(pool.members) - len(pool.up)

    def may_restart(self, allowed: bool) -> None:
        """Set whether a server that dies is restarted at once, as it is from the start, or waits for ``restart_down``."""
        self._started_pool().may_restart = allowed

    def restart_down(self) -> None:
        """Restart the servers that died while they could not be.

        Raises:
            RuntimeError: A server ended while starting, or did not answer in time. Nothing is left running.
        """
        self._run(self._started_pool().restart_down())

    def start(self) -> None:
        """Start all servers and return when they answer (20 to 60 s).

        Raises:
            ValueError: The servers need more GPUs than this node has, or the temporary directory's path is too long for sockets.
            RuntimeError: A server ended, or did not answer within ``start_timeout_s``. Nothing is left running.
        """
        if self._pool is not None:
            raise RuntimeError("the generator is started already")
        check_devices(self.config, self._num_here, torch.cuda.device_count() if self._spec.cuda else None)
        if self._spec.cuda:
            check_compute_mode()
        self._private_dir = PrivateDir()
        try:
            servers = [
                VllmServer(
                    index,
                    self._spec,
                    self._private_dir.path,
                    self._log_dir / f"server_{index}.log",
                    api_key=None if self._cluster is None else self._cluster.server_key(index),
                )
                for index in range(self._num_here)
            ]
        except ValueError:
            self._private_dir.remove()
            raise
        address = LOOPBACK if self._cluster is None else self._cluster.address
        transport = weight_transport(self._transfer, self.config, self._device, address, self._staging)
        try:
            others = [] if self._cluster is None else remote_servers(self._cluster, self.config.start_timeout_s)
        except RunError:
            self._private_dir.remove()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self._pool = ServerPool([*servers, *others], self.config, self._initial_version, transport)
        self._run(self._pool.start())

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        """Answer prompts, see ``Generator.generate``. Every sampling parameter is sent, so that no default of the server applies.

        Raises:
            ValueError: A prompt is empty or too long, or there are stop strings and no tokenizer.
            RuntimeError: A server failed beyond ``max_restarts``. Nothing is left running.
        """
        check_request(request, self.capabilities, self.max_model_len)
        sampling = request.sampling
        if sampling.stop and self._spec.tokenizer_path is None:
            raise ValueError(
                f"generate: sampling.stop={sampling.stop} needs a tokenizer; give the generator tokenizer_path"
            )
        self._require(ServersState.awake, "generate")
        pool = self._started_pool()
        if pool.version is None:
            raise RuntimeError("generate: the servers have random weights; call sync_weights first")
        stop = list(sampling.stop_token_ids) + ([] if sampling.ignore_eos else self.eos_token_ids)
        requests = Requests(pool, request, stop, self.config.request_timeout_s, on_response)
        pool.on_stalled = on_stalled
        try:
            return self._run(requests.run())
        finally:
            pool.on_stalled = None

    def beam_search(
        self, prompts: list[list[int]], *, num_beams: int, max_tokens: int, length_penalty: float, num_return: int
    ) -> list[list[Hypothesis]]:
        """Return the most probable responses to prompts that a beam search finds; see ``rollout/beam_search.py``.

        Every token of a live beam is one request. The prefix cache has the tokens before it.

        Args:
            prompts: Token ids.
            num_beams: Number of responses that are extended concurrently.
            max_tokens: Largest number of response tokens.
            length_penalty: Exponent of the length that a response's log-prob is divided by.
            num_return: Number of responses per prompt, at most ``num_beams``.

        Returns:
            For each prompt its responses, the highest score first.

        Raises:
            ValueError: A prompt is empty or too long, or a number is out of its range.
            RuntimeError: A server failed beyond ``max_restarts``. Nothing is left running.
        """
        check_prompts(prompts, [max_tokens] * len(prompts), self.max_model_len)
        searches = [BeamSearch(num_beams, max_tokens, length_penalty, self.eos_token_ids, num_return) for _ in prompts]
        count = min(searches[0].num_candidates, self._vocab_size)
        if count > MAX_LOG_PROBS:
            raise ValueError(
                f"beam search: num_beams={num_beams} needs {count} tokens at once; there are {MAX_LOG_PROBS}"
            )
        self._require(ServersState.awake, "beam search")
        pool, timeout_s = self._started_pool(), self.config.request_timeout_s

        def expand(prompt: list[int]) -> Expand:
            return lambda made: pool.call_least_loaded(
                "beam search", lambda client, member: client.top_log_probs(prompt + made, count, timeout_s)
            )

        return self._run(gather_all([run_search(s, expand(p)) for s, p in zip(searches, prompts, strict=True)]))

    @property
    def _vocab_size(self) -> int:
        return json.loads((Path(self._spec.model_path) / "config.json").read_text())["vocab_size"]

    def sleep(self) -> None:
        """Give the device's memory back, weights and KV cache. Nothing may be in flight.

        The weights are dropped, not kept in host memory (vLLM's sleep level 2). The next sync brings new ones, or the files of the
        last one bring them back. On a CPU vLLM has no device memory to give back; the order of calls is the same.

        Raises:
            RuntimeError: The weights are those of the model's folder, and no sync has written files to bring them back from.
        """
        if not self.capabilities.can_sleep or self._state is ServersState.asleep:
            return
        pool = self._started_pool()
        if pool.weights is None and pool.version is not None:
            raise RuntimeError(
                "sleep: the servers' weights were never synchronised and would be lost; call sync_weights before"
            )
        self._post_all("sleep", "/sleep?level=2")
        self._state, self._weights_dropped = ServersState.asleep, True

    def wake(self, *, weights_only: bool = False) -> None:
        """Take the device's memory again.

        Args:
            weights_only: Whether to take the memory of the weights alone, for a sync, so that the actor fits next to them.
        """
        if self._state is ServersState.asleep:
            self._post_all("wake", "/wake_up?tags=weights")
            self._state = ServersState.weights
        if self._state is ServersState.weights and not weights_only:
            pool = self._started_pool()
            if self._weights_dropped and pool.weights is not None:  # without a sync they were random ones
                self._run(pool.load(pool.weights))
                self._weights_dropped = False
            self._post_all("wake", "/wake_up?tags=kv_cache")
            self._state = ServersState.awake

    def _post_all(self, phase: str, route: str) -> None:
        pool, timeout_s = self._started_pool(), self.config.sync_timeout_s
        self._run(pool.call_up(phase, lambda client: client.post(phase, route, timeout_s)))

    def _require(self, state: ServersState, what: str) -> None:
        if self._state is ServersState.asleep or (state is ServersState.awake and self._state is not state):
            raise RuntimeError(f"{what}: the generator is {self._state.value}; wake it before")

    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str, *, target: str = POLICY) -> None:
        """Replace the servers' weights, see ``Generator.sync_weights``. ``last_sync`` then has the size and duration.

        Args:
            tensors: Pairs of Hugging Face name and full tensor of the whole model, read once, in order. Tied tensors may be left out.
            version: Label of the new weights. Responses carry it.
            target: Model that the weights are for.

        Raises:
            ValueError: There is no such target, or a tensor is missing, unknown, comes twice, or has the wrong shape. The servers
                keep their old weights.
            RuntimeError: A server failed, or its parameters hold other bytes than were sent. Nothing is left running.
        """
        check_target(target)
        self._require(ServersState.weights, "weight sync")
        pool = self._started_pool()
        transport = pool.transport
        self._num_syncs += 1
        start = time.perf_counter()
        packer = None
        if self._device.type == "cuda" or transport.sends_buckets:
            packer = Packer(self._staging, transport.sends_buckets)
        weights = take_weights(
            self._next_folder(sent=transport.sends_buckets), tensors, version, self.dtype, packer, target
        )
        written = time.perf_counter()
        previous = pool.weights
        if previous is None:
            check_room_for_another(weights)
        try:
            checksum_s = self._run(pool.load(weights))
        except ValueError:
            remove_files(weights)
            transport.release(weights)
            raise
        self.last_sync = SyncStats(weights.num_bytes, time.perf_counter() - start, written - start, checksum_s)
        self._weights_dropped = False
        if previous is not None:
            remove_files(previous)

    def _next_folder(self, *, sent: bool) -> Path | None:
        """Return the folder for the files of this sync. None: nobody would read them, because the servers are sent buckets."""
        assert self._private_dir is not None  # made before the pool
        if not keeps_weight_files(self.config, sent=sent, can_sleep=self.capabilities.can_sleep):
            return None
        return self._private_dir.path / f"weights_{self._num_syncs}"

    def sync_metrics(self) -> dict[str, float]:
        """Return the last weight sync's seconds and rate, and how servers shared the requests since the last call."""
        return {} if self.last_sync is None else self.last_sync.metrics() | self._share_metrics()

    def _share_metrics(self) -> dict[str, float]:
        """Return the share of requests that the least used server answered; {} with one server."""
        members = self._started_pool().members
        answered = [member.num_answered for member in members]
        for member in members:
            member.num_answered = 0
        if len(members) == 1 or sum(answered) == 0:
            return {}
        return {"rollout/least_server_share": min(answered) / sum(answered)}

    def prompt_log_probs(self, token_ids: list[int], server: int = 0) -> list[float]:
        """Return [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1, by one of the servers, for a prompt of L tokens."""
        return self._prompt_log_probs(token_ids, [self._started_pool().members[server]])[0]

    def _prompt_log_probs(self, token_ids: list[int], members: list[Member]) -> list[list[float]]:
        """Return the log-probs of several servers, which are asked concurrently."""
        self._require(ServersState.awake, "prompt log-probs")
        pool = self._started_pool()
        timeout_s = self.config.sync_timeout_s
        calls = [
            pool.call(member, "prompt_log_probs", lambda client: client.prompt_log_probs(token_ids, timeout_s))
            for member in members
        ]
        return self._run(gather_all(calls))

    def verify_sync(self, token_ids: list[int], log_probs: list[float]) -> float:
        """Compare every server's log-probs of a probe prompt with the trainer's own, see ``Generator.verify_sync``.

        Raises:
            RuntimeError: The difference exceeds ``verify_sync_tolerance``: the servers do not hold the trainer's weights. Nothing is
                left running.
        """
        largest, start = 0.0, time.perf_counter()
        found = self._prompt_log_probs(token_ids, self._started_pool().members)
        if self.last_sync is not None:
            self.last_sync = replace(self.last_sync, probe_s=time.perf_counter() - start)
        for server, server_log_probs in zip(self.servers, found, strict=True):
            what = f"weight sync {self.version!r}: {server.name}"
            meaning = "the server does not hold the trainer's weights"
            try:
                difference = probe_difference(server_log_probs, log_probs, self.config, self.dtype, what, meaning)
            except RunError:
                self.close()
                raise
            largest = max(largest, difference)
        return largest

    def close(self) -> None:
        """End the servers and remove sockets and weight files. May be called more than once."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        # All made with the pool.
        assert self._loop is not None and self._thread is not None and self._private_dir is not None
        try:
            asyncio.run_coroutine_threadsafe(pool.stop(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._private_dir.remove()
            self._staging.close()

    def _started_pool(self) -> ServerPool:
        if self._pool is None:
            raise RuntimeError("the generator is not running: it was not started, was closed, or ended with an error")
        return self._pool

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call on the generator's loop. Any error but ValueError ends the generator."""
        assert self._loop is not None  # the callers have asked for the pool
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except ValueError:
            raise
        except BaseException:
            future.cancel()
            self.close()
            raise
