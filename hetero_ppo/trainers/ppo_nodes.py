"""The nodes of a PPO run, where other nodes than rank 0's have rollout servers."""

from __future__ import annotations

import logging
import os

from hetero_ppo.config.derived import actor_generates, max_model_len, servers_of_nodes
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.data.chat_template import tokenizer_folder
from hetero_ppo.rollout.servers.nodes import Cluster, NodeServers, rendezvous
from hetero_ppo.rollout.servers.server import server_spec, sleeps
from hetero_ppo.trainers.run import Run
from megatron_bridge import platform

log = logging.getLogger(__name__)


def meet(config: PpoConfig, run: Run) -> Cluster | None:
    """The nodes, acquainted; None where all servers are on rank 0's, or there are none. Collective over the world."""
    counts = servers_of_nodes(config.rollout, run.world_size)
    if actor_generates(config) or config.train.replay_rollouts is not None or not any(counts[1:]):
        return None
    cluster = rendezvous(
        counts, config.rollout.interface, os.environ["MASTER_ADDR"], config.rollout.sync_timeout_s, run.world
    )
    log.info(f"rollout servers on {sum(map(bool, counts))} nodes, {counts}; node 0 is reached at {cluster.address}")
    return cluster


def begin_servers(config: PpoConfig, run: Run, cluster: Cluster | None) -> NodeServers | None:
    """The servers of this rank's node, to be started by rank 0's orders; None on rank 0's node and on ranks but the first of a node."""
    if cluster is None or cluster.node == 0 or os.environ["LOCAL_RANK"] != "0" or cluster.counts[cluster.node] == 0:
        return None
    model = config.actor.model
    spec = server_spec(
        config.rollout,
        cluster.counts[cluster.node],
        model_path=model.path,
        dtype=config.rollout.dtype or dtype_of(model),
        max_model_len=max_model_len(config),
        load_weights=not sleeps(config.rollout, cuda=platform.HAS_CUDA),
        tokenizer_path=servers_tokenizer(config),
    )
    servers = NodeServers(cluster, spec, run.dir.resolve() / "rollout")
    servers.begin()
    return servers


def servers_tokenizer(config: PpoConfig) -> str | None:
    """Folder of the tokenizer that servers need for stop strings alone; starting takes longer with one."""
    has_stops = bool(config.rollout.sampling.stop or config.rollout.eval_sampling.stop)
    return tokenizer_folder(config.actor.model) if has_stops else None
