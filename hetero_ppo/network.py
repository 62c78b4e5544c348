"""Addresses of this machine: nothing listens on all of them.

What one node needs listens on loopback; what is for other nodes listens on the address that they reach this node at, and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # <linux/sockios.h>
#: Of ``struct ifreq``: the name's bytes, and where the IPv4 address is.
IFNAME_BYTES, ADDRESS_AT = 15, 20
LOOPBACK = "127.0.0.1"
BACKLOG = 1024
#: Which interface gloo and NCCL listen on. Left alone, gloo takes the address that the host's name stands for, NCCL the first one.
#: Variable -> how it names just this interface; NCCL takes a bare name for the beginning of one.
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


def is_loopback(address: str) -> bool:
    """True for an address that other machines do not reach."""
    return address.startswith("127.") or address == "::1"


def _interface_address(probe: socket.socket, name: str) -> str:
    """IPv4 address of an interface; OSError where it has none."""
    request = struct.pack("256s", name.encode()[:IFNAME_BYTES])
    return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[ADDRESS_AT : ADDRESS_AT + 4])


def own_address(towards: str, interface: str | None = None) -> str:
    """The IPv4 address of this machine that the machine ``towards`` reaches it at.

    Args:
        towards: host name or address; nothing is sent there.
        interface: name of a network interface whose address it is instead (``eth0``); None: the one of the route.

    Raises:
        ValueError: there is no such interface, host or route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if interface is None:
                probe.connect((towards, 9))  # chooses the route; a datagram socket sends nothing by that
                return probe.getsockname()[0]
            return _interface_address(probe, interface)
        except OSError as error:
            if interface is None:
                raise ValueError(f"no route to {towards}: {error}; check MASTER_ADDR") from None
            names = [name for _, name in socket.if_nameindex()]
            raise ValueError(
                f"rollout.interface={interface!r} has no IPv4 address here ({error.strerror}); this machine has {names}"
            ) from None


def interface_of(address: str) -> str | None:
    """Name of the interface with this address; None where no interface has it. All of 127.* is loopback's."""
    if ":" in address:
        # <address, 32 digits> <index> <length of the prefix> <scope> <flags> <name>
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((row[5] for row in rows if row[0] == wanted), None)
    wanted = LOOPBACK if is_loopback(address) else address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = _interface_address(probe, name)
            except OSError:  # it has no IPv4 address
                continue
            if found == wanted:
                return name
    return None


def interface_towards(host: str) -> str | None:
    """Name of the interface of the route to another machine, by IPv4 where it has such an address.

    Raises:
        ValueError: there is no route.
    """
    try:
        places = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        family, _, _, _, place = min(places, key=lambda found: found[0] != socket.AF_INET)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # chooses the route; a datagram socket sends nothing by that
            return interface_of(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(f"no route to {host}: {error}; check MASTER_ADDR") from None


def keep_collectives_inside(*, one_node: bool) -> None:
    """Choose the interface that the process groups of this process listen on, before the first one is made.

    Args:
        one_node: True: loopback, whatever the environment says. False: the interface that leads to MASTER_ADDR, where the environment
            does not name another one.

    Raises:
        ValueError: there is no route to MASTER_ADDR.
    """
    name = interface_of(LOOPBACK) if one_node else interface_towards(os.environ["MASTER_ADDR"])
    if name is None:
        return
    for variable, form in INTERFACE_VARIABLES.items():
        if one_node:
            os.environ[variable] = form.format(name)
        else:
            os.environ.setdefault(variable, form.format(name))


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that already listens on the one address that ``host`` stands for.

    Args:
        host: name or address of this machine.
        port: 0 for one that is free.

    Raises:
        OSError: the port is taken, or no address of ``host`` is this machine's.
    """
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    error = OSError(f"{host} has no address")
    for family, _, _, _, place in sorted(places, key=lambda found: found[0] != socket.AF_INET):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run may linger
            listener.bind(place)
            listener.listen(BACKLOG)  # at once: two sockets may be bound to a port, one may listen
        except OSError as failure:
            listener.close()
            error = failure
        else:
            return listener
    raise error


class KeptPort:
    """A port of one address that stays with this process, whether somebody listens on it or not.

    The socket is handed to the process that serves (its descriptor, inherited), which therefore never has to bind. When that process
    ends the port is closed to clients (:func:`stop_listening`), and still nobody else can take it.

    Args:
        address: of this machine; never all of them.
    """

    def __init__(self, address: str):
        self.socket = self._bound(address)
        self.address = f"{address}:{self.socket.getsockname()[1]}"

    @staticmethod
    def _bound(address: str) -> socket.socket:
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))
                port = probe.getsockname()[1]
            # Asked for by its number: the kernel takes a port that it chose itself back when the socket stops listening.
            bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                bound.bind((address, port))
            except OSError as error:
                bound.close()
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return bound

    def listen(self) -> int:
        """Listen, from now on, and return the descriptor for the process that accepts."""
        # Connections of the last process may linger at the port. Nobody else can bind it while a socket listens, reusable or not.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.listen(BACKLOG)
        return self.socket.fileno()

    def close(self) -> None:
        """Give the port up. May be called more than once."""
        self.socket.close()


def stop_listening(listener: socket.socket) -> None:
    """Refuse clients from now on, in all processes that have the socket, and keep its port. One that does not listen stays as it is."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # A shutdown of one that does not listen would stay with it: of all later connections nothing could be read.
    if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.shutdown(socket.SHUT_RDWR)
