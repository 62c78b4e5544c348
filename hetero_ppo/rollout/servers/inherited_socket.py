"""Runs vLLM's HTTP server on an open socket: ``python -m hetero_ppo.rollout.servers.inherited_socket FD <vLLM's arguments>``.

vLLM would bind ``--host`` and ``--port`` itself. Before that, and at every restart, another user of the machine could take the port and
be sent tokens and prompts. The trainer's process therefore binds once, listens, and hands the socket over.
"""

from __future__ import annotations

import os
import socket
import sys

from hetero_ppo.network import stop_listening


class InheritedSocket(socket.socket):
    """A listening socket of another process. Closing it refuses clients, although the other process still has it open."""

    def __init__(self, descriptor: int):
        super().__init__(fileno=descriptor)
        self.set_inheritable(False)  # vLLM's other processes have no use for it
        # The event loop detaches this object's descriptor before it closes the object.
        self._twin = socket.socket(fileno=os.dup(descriptor))

    def close(self) -> None:
        """Close the socket and refuse its clients. May be called more than once."""
        if self._twin.fileno() >= 0:
            stop_listening(self._twin)
            self._twin.close()
        super().close()


def main() -> None:
    """Run vLLM's server as its own command does, on the inherited socket."""
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server import entry

    inherited = InheritedSocket(int(sys.argv.pop(1)))
    replaced = launcher.create_server_socket  # an error here means that vLLM has changed

    def create_server_socket(address: tuple[str, int], *, reuse_port: bool) -> socket.socket:
        if inherited.getsockname() != address:
            raise RuntimeError(
                f"the inherited socket is at {inherited.getsockname()}, {replaced.__name__} asks for {address}"
            )
        return inherited

    launcher.create_server_socket = create_server_socket
    entry.main()


if __name__ == "__main__":
    main()
