"""Addresses of this machine: what is for other nodes listens on the cluster's own interface, and nowhere else."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # <linux/sockios.h>
#: Of ``struct ifreq``: the name's bytes, and where the IPv4 address is.
IFNAME_BYTES, ADDRESS_AT = 15, 20
LOOPBACK = "127.0.0.1"


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
            request = struct.pack("256s", interface.encode()[:IFNAME_BYTES])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[ADDRESS_AT : ADDRESS_AT + 4])
        except OSError as error:
            if interface is None:
                raise ValueError(f"no route to {towards}: {error}; check MASTER_ADDR") from None
            names = [name for _, name in socket.if_nameindex()]
            raise ValueError(
                f"rollout.interface={interface!r} has no IPv4 address here ({error.strerror}); this machine has {names}"
            ) from None


def bound_socket(address: str, *, shared: bool = False) -> socket.socket:
    """A TCP socket on a free port of one address.

    Args:
        address: of this machine; never all of them.
        shared: another socket may bind the port as well (SO_REUSEADDR): this one, which never listens, keeps it for that one.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((address, 0))
    return bound
