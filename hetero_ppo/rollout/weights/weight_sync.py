"""Lets servers check and load new weights that have been brought to them.

A weight sync has these parts, in order:

1. ``weight_version.py`` reads the actor's tensors into buckets and takes a checksum of each tensor.
2. ``transports.py`` brings the bytes to the servers.
3. :func:`stage` lets every server compare names, shapes and checksums. Until then all servers keep their old weights.
4. :func:`swap` pauses a server, loads the weights, compares what its parameters then hold with the checksums, drops the prefix
   cache, sets the version's label and resumes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient
from hetero_ppo.rollout.weights.weight_version import WeightVersion


@dataclass(frozen=True)
class SyncStats:
    """Size and duration of the last weight sync."""

    num_bytes: int  # of the model in the servers' dtype, counted once however many servers took it
    seconds: float  # from the request for the first tensor until the last server answers prompts again
    write_s: float  # part of them: reading the tensors from the trainer, checksums and files
    checksum_s: float  # part of them: the slowest server's own checksums
    probe_s: float = 0.0  # after them: the probe prompt on all servers; 0: it was not asked

    @property
    def gb_s(self) -> float:
        """Rate of the sync: bytes of the model over all of the seconds, GB/s."""
        return self.num_bytes / self.seconds / 1e9

    def metrics(self) -> dict[str, float]:
        """Return the sync's metrics by name."""
        return {
            "rollout/sync_s": self.seconds,
            "rollout/sync_gb_s": self.gb_s,
            "rollout/verify_s": self.checksum_s + self.probe_s,
        }


async def stage(client: ServerClient, weights: WeightVersion, timeout_s: float, *, reads_files: bool = True) -> float:
    """Let a server check the tensors. Its weights stay as they are.

    Args:
        client: Client of the server.
        weights: Version to check.
        timeout_s: Deadline in seconds.
        reads_files: Whether the server reads the files. False: the buckets were brought to it (``transports.py``).

    Returns:
        Seconds that the server's slowest worker spent on checksums.

    Raises:
        ValueError: A tensor is missing, unknown, or of the wrong shape.
        RuntimeError: A tensor's bytes did not arrive as they were sent.
    """
    paths = [str(path) for path in weights.paths] if reads_files else None
    method, target = "hetero_ppo_stage_weights", weights.target
    results = await client.call_worker("weight sync", method, timeout_s, target=target, paths=paths)
    for result in results:
        if result["problems"]:
            shown = "; ".join(result["problems"][:8])
            more = len(result["problems"]) - 8
            raise ValueError(
                f"weight sync {weights.version!r}: the tensors do not fit the model of {client.server.name}: {shown}"
                + (f"; and {more} more" if more > 0 else "")
                + ". The server keeps its old weights."
            )
        wrong = sorted(name for name, digest in weights.checksums.items() if result["checksums"][name] != digest)
        if wrong:
            raise RunError(
                f"weight sync {weights.version!r}: {client.server.name} read other bytes than were written for {wrong[:8]}"
            )
    return max(result["verify_s"] for result in results)


async def swap(client: ServerClient, weights: WeightVersion, timeout_s: float, *, verify: bool) -> float:
    """Put staged weights in place and drop everything that was computed with the old ones.

    Args:
        client: Client of a server that has staged ``weights``.
        weights: New version.
        timeout_s: Deadline of each call in seconds.
        verify: Whether to compare what the server's parameters hold afterwards with the version's checksums.

    Returns:
        Seconds that the server's slowest worker spent on checksums.

    Raises:
        RuntimeError: The parameters hold something else, or the prefix cache could not be dropped.
    """
    phase = f"weight sync {weights.version!r}"
    await client.post("weight sync", "/pause?mode=wait", timeout_s)
    method, target = "hetero_ppo_load_staged", weights.target
    results = await client.call_worker("weight sync", method, timeout_s, target=target, verify=verify)
    for rank, result in enumerate(results):
        for found, what in (("wrong", "hold other bytes than were sent for"), ("unread", "were not found to hold")):
            if result[found]:
                raise RunError(
                    f"{phase}: the parameters of {client.server.name} (tensor-parallel rank {rank}) {what} "
                    f"{result[found][:8]}, {len(result[found])} in all"
                )
    reset = await client.post("weight sync", "/reset_prefix_cache", timeout_s)
    if not reset["success"]:
        raise RunError(f"{phase}: {client.server.name} could not reset its prefix cache")
    await client.post("weight sync", "/update_weight_version", timeout_s, {"new_version": weights.version})
    await client.post("weight sync", "/resume", timeout_s)
    return max(result["verify_s"] for result in results)
