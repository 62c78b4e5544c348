"""Let the members of a gloo group prove to each other that they belong to the same run.

gloo accepts the first connection to its port as the peer that it waits for. Another user of the machine could connect, read what is sent,
and answer. Some of the data that ranks exchange is unpickled (Megatron-Core's checkpoints). So before a group is used, every two members
exchange an HMAC under a key that only the run has.
"""

from __future__ import annotations

import hmac

import torch
import torch.distributed as dist

from hetero_ppo.errors import RunError

PROOF_BYTES = 32


def _proof(key: bytes, group: str, sender: int, receiver: int) -> bytes:
    return hmac.digest(key, f"rank {sender} to rank {receiver} in {group}".encode(), "sha256")


def prove_peers(group: dist.ProcessGroup, key: bytes, name: str) -> None:
    """Exchange proofs with every member of a new group. Collective over the group.

    Args:
        group: Group with a backend for host tensors.
        key: Key of the run.
        name: Name of the group, unique in the run.

    Raises:
        RunError: A process of another run takes part.
    """
    rank, size = group.rank(), group.size()
    if size == 1:
        return
    sent = b"".join(_proof(key, name, rank, peer) for peer in range(size))
    received = torch.empty(size * PROOF_BYTES, dtype=torch.uint8)
    group.alltoall_base(
        received, torch.frombuffer(bytearray(sent), dtype=torch.uint8), [], [], dist.AllToAllOptions()
    ).wait()
    found = bytes(received.tolist())
    for peer in range(size):
        if not hmac.compare_digest(found[peer * PROOF_BYTES : (peer + 1) * PROOF_BYTES], _proof(key, name, peer, rank)):
            raise RunError(
                f"rank {rank} of {size} in {name}: the process that connected as rank {peer} is not part of this run; nothing was sent there. "
                "Does another user of the machine, or of the cluster's network, connect to the ports of this run?"
            )
