"""The order of rows: complete, the same for any number of ranks, and resumable."""

from __future__ import annotations

import pytest

from hetero_ppo.data.sampler import ResumableSampler, sequential_batches


def sampler(num_rows: int = 10, batch: int = 4, rank: int = 0, size: int = 1, **changes: object) -> ResumableSampler:
    options = {"seed": 1, "shuffle": True, "fingerprint": "abc"} | changes
    return ResumableSampler(num_rows, batch, rank, size, **options)


def test_every_epoch_sees_every_row_once_across_batch_borders() -> None:
    one = sampler()
    stream = [row for _ in range(5) for row in one.next_batch()]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert (one.epoch, one.position) == (2, 0)


def test_the_seed_and_the_epoch_order_the_rows() -> None:
    orders = [sampler(num_rows=20, batch=20, seed=seed).next_batch() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_may_be_larger_than_the_data() -> None:
    batch = sampler(num_rows=3, batch=8).next_batch()
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_without_shuffling_rows_come_in_file_order() -> None:
    one = sampler(shuffle=False)
    assert [one.next_batch() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("size", [2, 4])
def test_minibatches_hold_the_same_rows_for_any_number_of_ranks(size: int) -> None:
    whole = sampler(num_rows=50, batch=16).next_batch()
    shares = [sampler(num_rows=50, batch=16, rank=rank, size=size).next_batch() for rank in range(size)]
    for part in range(2):
        together = [row for share in shares for row in share[part * 8 // size : (part + 1) * 8 // size]]
        assert sorted(together) == sorted(whole[part * 8 : (part + 1) * 8])


@pytest.mark.parametrize(("done", "place"), [(3, (1, 5)), (7, (4, 0))])
def test_resuming_continues_the_same_stream_on_another_number_of_ranks(done: int, place: tuple[int, int]) -> None:
    """In the middle of an epoch, over whose end the stream goes, and at the end of one."""
    straight = sampler(num_rows=7)
    expected = [straight.next_batch() for _ in range(done + 4)]
    first = sampler(num_rows=7)
    for _ in range(done):
        first.next_batch()
    assert (first.epoch, first.position) == place
    resumed = [sampler(num_rows=7, rank=rank, size=2) for rank in range(2)]
    for one in resumed:
        one.load_state_dict(first.state_dict())
    for batch in expected[done:]:
        shares = [one.next_batch() for one in resumed]
        assert [row for pair in zip(*shares, strict=True) for row in pair] == batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "xyz"}, "made on other data"),
        ({"seed": 2}, "run.seed=1"),
        ({"shuffle": False}, "data.shuffle=True"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**changes).load_state_dict(sampler().state_dict())


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide over 3"):
        sampler(size=3)
    with pytest.raises(ValueError, match="no rows"):
        sampler(num_rows=0)


def test_evaluation_sees_every_row_once_on_any_number_of_ranks() -> None:
    shares = [list(sequential_batches(10, 4, rank, 4)) for rank in range(4)]
    assert [len(share) for share in shares] == [3, 3, 3, 3]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(10))
    assert shares[3][2] == []
