"""Addresses of this machine, and sockets that never listen on all of them.

Services for one node listen on loopback. Services for other nodes listen only on the address by which these reach this node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # <linux/sockios.h>
#: Layout of ``struct ifreq``: number of bytes of the name, and offset of the IPv4 address.
IFNAME_BYTES, ADDRESS_AT = 15, 20
LOOPBACK = "127.0.0.1"
BACKLOG = 1024
#: Variables that choose the interface on which gloo and NCCL listen, with the form that means exactly this interface: NCCL reads a bare name
#: as the beginning of one. Without them gloo takes the address that the host's name stands for, and NCCL the first interface.
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


def is_loopback(address: str) -> bool:
    """Return True for an address that other machines cannot reach."""
    return address.startswith("127.") or address == "::1"


def _interface_address(probe: socket.socket, name: str) -> str:
    """Return the IPv4 address of an interface; raise OSError if it has none."""
    request = struct.pack("256s", name.encode()[:IFNAME_BYTES])
    return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[ADDRESS_AT : ADDRESS_AT + 4])


def own_address(towards: str, interface: str | None = None) -> str:
    """Return the IPv4 address of this machine by which another machine reaches it.

    Args:
        towards: Host name or address of the other machine; nothing is sent to it.
        interface: Name of a network interface (``eth0``) whose address is returned instead; None: the interface of the route.

    Raises:
        ValueError: There is no such interface, host or route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if interface is None:
                probe.connect((towards, 9))  # chooses the route; on a datagram socket this sends nothing
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
    """Return the name of the interface with this address; None if no interface has it. All of 127.* belongs to loopback."""
    if ":" in address:
        # <address, 32 digits> <index> <length of the prefix> <scope> <flags> <name>
        address_text = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((row[5] for row in rows if row[0] == address_text), None)
    address_text = LOOPBACK if is_loopback(address) else address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = _interface_address(probe, name)
            except OSError:  # it has no IPv4 address
                continue
            if found == address_text:
                return name
    return None


def interface_towards(host: str) -> str | None:
    """Return the name of the interface of the route to another machine, by IPv4 if that has such an address.

    Raises:
        ValueError: There is no route.
    """
    try:
        places = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        family, _, _, _, place = min(places, key=lambda found: found[0] != socket.AF_INET)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # chooses the route; on a datagram socket this sends nothing
            return interface_of(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(f"no route to {host}: {error}; check MASTER_ADDR") from None


def keep_collectives_inside(*, one_node: bool) -> None:
    """Choose the interface on which the process groups of this process listen. Call it before the first group is made.

    Args:
        one_node: True: loopback, even if the environment names another one. False: the interface that leads to MASTER_ADDR, unless the
            environment names another one.

    Raises:
        ValueError: There is no route to MASTER_ADDR.
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
    """Return a TCP socket that already listens on the one address that ``host`` stands for.

    Args:
        host: Name or address of this machine.
        port: Port number; 0 for a free one.

    Raises:
        OSError: The port is taken, or no address of ``host`` belongs to this machine.
    """
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    error = OSError(f"{host} has no address")
    for family, _, _, _, place in sorted(places, key=lambda found: found[0] != socket.AF_INET):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run may linger
            listener.bind(place)
            listener.listen(BACKLOG)  # now, because several sockets may be bound to a port but only one may listen
        except OSError as failure:
            listener.close()
            error = failure
        else:
            return listener
    raise error


class KeptPort:
    """A port of one address that this process keeps, whether somebody listens on it or not.

    The process that serves inherits the socket's descriptor, so it never has to bind. When that process ends, the port is closed to clients
    (:func:`stop_listening`), but nobody else can take it.

    Args:
        address: Address of this machine; never all of them.
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
            # The port is bound by its number: if the kernel chooses a port itself, it takes it back when the socket stops listening.
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
        """Start to listen, and return the descriptor for the process that accepts."""
        # Connections of the previous process may linger at the port. While a socket listens, nobody else can bind it, reusable or not.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.listen(BACKLOG)
        return self.socket.fileno()

    def close(self) -> None:
        """Release the port. It may be called more than once."""
        self.socket.close()


def stop_listening(listener: socket.socket) -> None:
    """Refuse clients from now on, in all processes that have the socket, but keep its port. Does nothing to a socket that does not listen."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # A shutdown of a socket that does not listen would be permanent: nothing could be read from any later connection.
    if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.shutdown(socket.SHUT_RDWR)
