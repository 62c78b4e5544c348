"""A key-value store of torch that refuses values which were not written with the run's key.

A ``TCPStore`` has no password: everybody who reaches its port can read and set all names and values. So nothing secret is ever
written. Every value has a counter, and an HMAC of its name, counter and content. Values without the run's HMAC are refused, and so are values older
than what was read before. Others can still stop the run from going on.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import secrets
from datetime import timedelta

import torch.distributed as dist

log = logging.getLogger(__name__)

COUNTER_BYTES = 8
MAC_BYTES = 32
SECRET_BYTES = 32


def new_secret() -> bytes:
    """Return a new random key."""
    return secrets.token_bytes(SECRET_BYTES)


def derived_key(secret: bytes, purpose: str) -> bytes:
    """Return the key for one purpose. Neither the secret nor another purpose's key can be computed from it."""
    return hmac.digest(secret, purpose.encode(), "sha256")


class RefusedValueError(RuntimeError):
    """A value was not written by this run, or is an old one that was written again."""


class SignedStore(dist.Store):
    """The values of another store whose names begin with one prefix. Each value has one writer.

    Process groups can be made with it: torch calls the methods below from C++. Keep a reference for as long as such a group lives.

    Args:
        store: Store that all members reach.
        key: Key that all members have, and nobody else.
        name: Prefix of the names of all values.
    """

    def __init__(self, store: dist.Store, key: bytes, name: str):
        super().__init__()
        self._store, self._key, self._name = store, key, name
        self._counter = itertools.count(1)
        self._newest: dict[str, tuple[int, bytes]] = {}  # name -> counter and content of the newest value that was read
        self._refused: set[str] = set()  # names whose refusal was logged

    def _full(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _mac(self, key: str, content: bytes) -> bytes:
        return hmac.digest(
            self._key, len(self._full(key)).to_bytes(4, "big") + self._full(key).encode() + content, "sha256"
        )

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value with a higher counter than all that this member wrote before."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        content = next(self._counter).to_bytes(COUNTER_BYTES, "big") + value
        self._store.set(self._full(key), self._mac(key, content) + content)  # type: ignore[arg-type]  # bytes are not in torch's stub

    def get(self, key: str) -> bytes:
        """Wait for a value and return it.

        Raises:
            RefusedValueError: It was not written by a member, or is older than the newest one that was read.
        """
        found = self._store.get(self._full(key))
        mac, content = found[:MAC_BYTES], found[MAC_BYTES:]
        if len(content) < COUNTER_BYTES or not hmac.compare_digest(mac, self._mac(key, content)):
            raise RefusedValueError(f"{self._full(key)}: a value that was not written by this run")
        counter, value = int.from_bytes(content[:COUNTER_BYTES], "big"), content[COUNTER_BYTES:]
        if counter < self._newest.get(key, (0, b""))[0]:
            raise RefusedValueError(f"{self._full(key)}: an old value, written once more")
        self._newest[key] = counter, value
        return value

    def newest(self, key: str) -> bytes | None:
        """Return the newest value of a member; None before the first one. A refusal is logged once for every name."""
        if self._store.check([self._full(key)]):
            try:
                return self.get(key)
            except RefusedValueError as error:
                if key not in self._refused:
                    log.warning("refused in the store of the run: %s. Who else writes there?", error)
                self._refused.add(key)
        return self._newest[key][1] if key in self._newest else None

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._full(key) for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        names = [self._full(key) for key in keys]
        if timeout is None:
            self._store.wait(names)
        else:
            self._store.wait(names, timeout)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter. Counters have no HMAC, so nothing here decides by them."""
        return self._store.add(self._full(key), amount)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._full(key))

    def num_keys(self) -> int:
        return self._store.num_keys()

    def has_extended_api(self) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)
