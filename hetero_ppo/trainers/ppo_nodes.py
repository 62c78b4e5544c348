"""The nodes of a PPO run, where other nodes than rank 0's have rollout servers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from hetero_ppo.config.derived import max_model_len, servers_of_nodes
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import ModelConfig, PpoConfig, RolloutConfig
from hetero_ppo.data.chat_template import tokenizer_folder
from hetero_ppo.rollout.servers.nodes import Cluster, NodeServers, rendezvous
from hetero_ppo.rollout.servers.server import server_spec, sleeps
from hetero_ppo.trainers.run import Run
from megatron_bridge import platform

log = logging.getLogger(__name__)


def find_nodes(rollout: RolloutConfig, run: Run) -> Cluster | None:
    """Let the nodes that have rollout servers find each other. Collective over the world.

    Args:
        rollout: The ``rollout`` section of a run with servers.
        run: Run of this process.

    Returns:
        The nodes; None where all servers are on rank 0's node.
    """
    counts = servers_of_nodes(rollout, run.world_size)
    if not any(counts[1:]):
        return None
    cluster = rendezvous(counts, rollout.interface, os.environ["MASTER_ADDR"], rollout.sync_timeout_s, run.world)
    log.info(f"rollout servers on {sum(map(bool, counts))} nodes, {counts}; node 0 is reached at {cluster.address}")
    return cluster


@contextlib.contextmanager
def open_node_servers(config: PpoConfig, run: Run, cluster: Cluster | None) -> Iterator[None]:
    """Let the first rank of every node but rank 0's start its node's servers when rank 0 orders it, and end them with the block.

    Other ranks do nothing. Rank 0's node has its servers in the generator.

    Args:
        config: Configuration of the run.
        run: Run of this process.
        cluster: Nodes with rollout servers, from ``find_nodes``.
    """
    if cluster is None or cluster.node == 0 or os.environ["LOCAL_RANK"] != "0" or cluster.counts[cluster.node] == 0:
        yield
        return
    model = config.actor.model
    spec = server_spec(
        config.rollout,
        cluster.counts[cluster.node],
        model_path=model.path,
        dtype=config.rollout.dtype or dtype_of(model),
        max_model_len=max_model_len(config),
        load_weights=not sleeps(config.rollout, cuda=platform.HAS_CUDA),
        tokenizer_path=servers_tokenizer(config.rollout, model),
    )
    with contextlib.closing(NodeServers(cluster, spec, run.dir.resolve() / "rollout")) as servers:
        servers.begin()
        yield


def servers_tokenizer(rollout: RolloutConfig, model: ModelConfig) -> str | None:
    """Return the folder of the tokenizer where the servers need one, for stop strings; with one they start more slowly."""
    has_stops = bool(rollout.sampling.stop or rollout.eval_sampling.stop)
    return tokenizer_folder(model) if has_stops else None
