"""Two gloo ranks against one: log-probs over a split vocabulary, moments over split rows."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hetero_ppo.algorithms.masking import whiten
from hetero_ppo.distributed import vocab_parallel
from hetero_ppo.distributed.statistics import all_reduce_metric_sums, global_masked_moments
from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs

WORLD = 2


def _rank_main(rank: int, store: str, check: Callable[[int, dist.ProcessGroup], None]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    check(rank, dist.new_group([0, 1]))
    dist.destroy_process_group()


def _on_two_ranks(tmp_path: Path, check: Callable[[int, dist.ProcessGroup], None]) -> None:
    mp.spawn(_rank_main, args=(str(tmp_path / "store"), check), nprocs=WORLD, join=True)


def _check_vocab_parallel(rank: int, group: dist.ProcessGroup) -> None:
    vocab_parallel._CHUNK_ELEMENTS_CPU = 100  # several slices of rows, the last one ragged
    # No padding; padding on rank 1; rank 1 all padding.
    for vocab_size, temperature in ((32, 1.0), (27, 0.6), (13, 0.6)):
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
            _compare_layouts(rank, group, vocab_size, temperature, dtype, rtol)


def _compare_layouts(
    rank: int, group: dist.ProcessGroup, vocab_size: int, temperature: float, dtype: torch.dtype, rtol: float
) -> None:
    """Compare results and gradients of 16 columns on each of two ranks with those of 32 on one; ``rtol`` is the gradient's."""
    generator = torch.Generator().manual_seed(vocab_size)
    full = (4 * torch.randn(3, 7, 32, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (3, 7), generator=generator)
    weights = torch.randn(2, 3, 7, generator=generator)
    own = slice(rank * 16, (rank + 1) * 16)

    def run(logits: torch.Tensor, tp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
        options = {"temperature": temperature, "vocab_size": vocab_size, "tp_group": tp_group}
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs(leaf, targets, with_entropy=True, **options)
        (weights[0] * log_probs + weights[1] * entropy).sum().backward()
        without, none = vocab_parallel_log_probs(logits, targets, with_entropy=False, **options)
        assert none is None and torch.equal(without, log_probs)
        return log_probs.detach(), entropy.detach(), leaf.grad

    one, two = run(full, None), run(full[..., own], group)
    precise = min(rtol, 1e-5)  # log-probs are float32 on bf16 logits too
    for index in (0, 1):
        torch.testing.assert_close(two[index], one[index], rtol=precise, atol=precise)
        _assert_equal_on_all_ranks(two[index], group)
    torch.testing.assert_close(two[2], one[2][..., own], rtol=rtol, atol=precise / 10)
    assert not two[2][..., max(0, vocab_size - own.start) :].any()


def _check_statistics(rank: int, group: dist.ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(1)
    values = 50 + torch.randn(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    cases = {"even": [3, 3], "uneven": [1, 5], "one rank has no row": [6, 0]}
    for sizes in cases.values():
        rows = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], 6)
        moments = global_masked_moments(values[rows], mask[rows], group)
        alone = global_masked_moments(values, mask, None)
        assert moments.count == alone.count == int(mask.sum())
        assert abs(moments.mean - alone.mean) < 1e-12 and abs(moments.var - alone.var) < 1e-12
        _assert_equal_on_all_ranks(torch.tensor([moments.mean, moments.var], dtype=torch.float64), group)
        whole = whiten(values, mask, alone.mean, alone.var)
        part = whiten(values[rows], mask[rows], moments.mean, moments.var)
        torch.testing.assert_close(part, whole[rows], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="mask is empty on all ranks"):
        global_masked_moments(values, torch.zeros_like(mask), group)

    # Names in another order on each rank.
    names = ["count", "actor/pg_loss", "actor/ppo_kl"]
    sums = {name: torch.tensor(float(10**rank * (len(name)))) for name in (names if rank == 0 else names[::-1])}
    assert all_reduce_metric_sums(sums, group) == {name: 11.0 * len(name) for name in names}


def _assert_equal_on_all_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    parts = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    assert torch.equal(parts[0], parts[1])


def _check_all(rank: int, group: dist.ProcessGroup) -> None:
    _check_vocab_parallel(rank, group)
    _check_statistics(rank, group)


@pytest.mark.slow
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    _on_two_ranks(tmp_path, _check_all)


def test_moments_of_one_process_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    moments = global_masked_moments(torch.tensor([[1.0, 2.0, 6.0, 99.0]]), mask, None)
    assert moments.mean == pytest.approx(3.0) and moments.var == pytest.approx(14 / 3) and moments.count == 3


def test_moments_keep_their_digits_far_from_zero() -> None:
    values = 1e8 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert global_masked_moments(values, torch.ones(3, dtype=torch.bool), None).var == pytest.approx(2 / 3, rel=1e-9)
