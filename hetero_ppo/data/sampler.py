"""Choose the rows of every step: the same rows for any number of ranks, exactly resumable."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from hetero_ppo.config.on_resume import is_named


class ResumableSampler:
    """An endless stream of rows: epoch after epoch, each in an order drawn from (seed, epoch).

    Steps are cut from this one stream. The rows that are left at the end of an epoch start the first batch of the next one, so no row is
    skipped, and none comes twice before all have come once. Rank r of D gets rows r, r + D, r + 2D, ... of the global batch. So the first 1/n
    of every rank's rows together is the first 1/n of the global batch, and minibatches cut from the front hold the same rows for any D.
    """

    def __init__(
        self,
        num_rows: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
        fingerprint: str,
    ) -> None:
        """Start at the first row.

        Args:
            num_rows: Number of rows of the data set.
            global_batch_size: Rows of a batch over all ranks.
            dp_rank: Data-parallel rank of this process.
            dp_size: Number of data-parallel ranks.
            seed: Seed of the order.
            shuffle: Whether rows are shuffled; otherwise they come in file order.
            fingerprint: Fingerprint of the data set; a checkpoint of another data set is refused.

        Raises:
            ValueError: There are no rows, or the batch does not divide over the ranks.
        """
        if num_rows < 1:
            raise ValueError("the data set has no rows to sample from")
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ValueError(
                f"global batch of {global_batch_size} rows does not divide over {dp_size} data-parallel ranks"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is not in 0..{dp_size - 1}")
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.rows_consumed = 0  # summed over all epochs and ranks
        self._order_epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)  # eight bytes a row; a list takes thirty-six

    @property
    def epoch(self) -> int:
        """Number of complete passes before the next row: 0 in the first pass."""
        return self.rows_consumed // self.num_rows

    @property
    def position(self) -> int:
        """Number of rows of the current epoch that were handed out."""
        return self.rows_consumed % self.num_rows

    def next_batch(self) -> list[int]:
        """Return this rank's rows of the next global batch, ``global_batch_size / dp_size`` of them."""
        return self.next_global_batch()[self.dp_rank :: self.dp_size]

    def next_global_batch(self) -> list[int]:
        """Return all rows of the next global batch. Call it instead of ``next_batch``, not in addition to it."""
        rows = [self._row_at(self.rows_consumed + offset) for offset in range(self.global_batch_size)]
        self.rows_consumed += self.global_batch_size
        return rows

    def _row_at(self, stream_position: int) -> int:
        epoch, position = divmod(stream_position, self.num_rows)
        if not self.shuffle:
            return position
        if epoch != self._order_epoch:
            self._order = self._permutation(epoch)
            self._order_epoch = epoch
        return int(self._order[position])

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with which ``load_state_dict`` continues at the next row, for any number of ranks."""
        return {
            "rows_consumed": self.rows_consumed,
            "epoch": self.epoch,
            "position": self.position,
            "num_rows": self.num_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(
        self, state: dict[str, Any], *, allowed: Collection[str] = (), is_data_allowed: bool = False
    ) -> None:
        """Continue where ``state`` was taken. The batch size and the number of ranks may differ.

        Args:
            state: Result of ``state_dict``.
            allowed: Options in ``checkpoint.allow_changes``; with another seed or order the run continues at the same place.
            is_data_allowed: Whether the data may differ. The run continues at the same place, or at the beginning if the number of rows
                differs.

        Raises:
            ValueError: The checkpoint has other data or another order.
        """
        is_other = state["fingerprint"] != self.fingerprint or state["num_rows"] != self.num_rows
        if is_other and not is_data_allowed:
            raise ValueError(
                f"the checkpoint was made on other data: {state['num_rows']} rows, fingerprint "
                f"{state['fingerprint'][:12]}; this run has {self.num_rows} rows, fingerprint {self.fingerprint[:12]}. "
                "The fingerprint covers the token ids, so another file, tokenizer, template or length limit changes it"
            )
        for name, field in (("seed", "run.seed"), ("shuffle", "data.shuffle")):
            if state[name] != vars(self)[name] and not is_named(field, allowed):
                raise ValueError(
                    f"the checkpoint was made with {field}={state[name]}, this run has {vars(self)[name]}: the "
                    f"order of the rows would change; set {field}={state[name]}"
                )
        self.rows_consumed = state["rows_consumed"] if state["num_rows"] == self.num_rows else 0


def sequential_batches(num_rows: int, global_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
    """Yield this rank's rows of each batch of one pass in file order, for evaluation. Every row comes once.

    The last batch may be smaller, and some ranks' share of it may be empty; all ranks get the same number of batches.
    """
    for start in range(0, num_rows, global_batch_size):
        yield list(range(start, min(start + global_batch_size, num_rows)))[dp_rank::dp_size]
