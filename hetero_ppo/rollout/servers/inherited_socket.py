"""vLLM's HTTP server on a socket that is open already: ``python -m hetero_ppo.rollout.servers.inherited_socket FD <vLLM's arguments>``.

vLLM would bind ``--host`` and ``--port`` itself. Between the moment that a port is chosen and that one, and at every restart, another user
of the machine could take it, and be sent tokens and prompts. So the trainer's process binds once, listens, and hands the socket over.
"""

from __future__ import annotations

import os
import socket
import sys

from hetero_ppo.network import stop_listening


class InheritedSocket(socket.socket):
    """A listening socket of another process. Closing it here refuses clients there too, as closing the only one would."""

    def __init__(self, descriptor: int):
        super().__init__(fileno=descriptor)
        self.set_inheritable(False)  # vLLM's other processes have no use for it
        self._twin = socket.socket(
            fileno=os.dup(descriptor)
        )  # the event loop takes this object's descriptor away before it is closed

    def close(self) -> None:
        """May be called more than once."""
        if self._twin.fileno() >= 0:
            stop_listening(self._twin)
            self._twin.close()
        super().close()


def main() -> None:
    """Run vLLM's server as its own command does, but for who makes the socket."""
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server import entry

    inherited = InheritedSocket(int(sys.argv.pop(1)))
    replaced = launcher.create_server_socket  # an error here says that vLLM has changed

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
