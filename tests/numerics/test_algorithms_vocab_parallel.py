"""Log-probs and entropy on one rank: exact against torch in float64, accurate on bf16, and small."""

from collections.abc import Callable

import pytest
import torch

from hetero_ppo.distributed import vocab_parallel
from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(
    rows: tuple[int, ...],
    columns: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 3.0,
    seed: int = 0,
):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(*rows, columns, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, vocab_size, rows, generator=generator)


def exact(logits: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_size: int):
    log_softmax = torch.log_softmax(logits[..., :vocab_size].double() / temperature, dim=-1)
    log_probs = log_softmax.gather(-1, targets[..., None]).squeeze(-1)
    return log_probs, -(log_softmax.exp() * log_softmax).sum(dim=-1)


def ours(logits: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_size: int, with_entropy: bool = True):
    return vocab_parallel_log_probs(
        logits, targets, temperature=temperature, vocab_size=vocab_size, tp_group=None, with_entropy=with_entropy
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1 << 20, 33])  # all rows at once, three rows at a time
def test_values_and_gradients_against_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk_elements: int
) -> None:
    monkeypatch.setattr(vocab_parallel, "_CHUNK_ELEMENTS_CPU", chunk_elements)
    logits, targets = make((2, 5), 13, 11)  # two columns of padding
    weights = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(
        function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        log_prob_weight: torch.Tensor,
        entropy_weight: torch.Tensor,
    ):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = function(leaf, targets, temperature, 11)
        loss = (log_prob_weight * log_probs).sum() + (entropy_weight * entropy).sum()
        return log_probs, entropy, torch.autograd.grad(loss, leaf)[0]

    for log_prob_weight, entropy_weight in ((weights[0], weights[1]), (weights[0], 0 * weights[1])):
        got = gradient(ours, log_prob_weight, entropy_weight)
        want = gradient(exact, log_prob_weight, entropy_weight)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)
        assert not got[2][..., 11:].any()


@pytest.mark.parametrize("used", ["both", "log_probs", "entropy"])
def test_gradcheck(used: str) -> None:
    logits, targets = make((3,), 7, 6)

    def function(x: torch.Tensor):
        log_probs, entropy = ours(x, targets, 0.8, 6)
        return {"both": (log_probs, entropy), "log_probs": log_probs, "entropy": entropy}[used]

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_bf16_logits_cost_no_accuracy_beyond_their_own_rounding() -> None:
    """Against float64 on the same bf16 numbers: 1e-5 in log-prob and entropy, half a bf16 digit in the gradient."""
    logits, targets = make((64,), 32_000, 32_000, torch.bfloat16, scale=6.0)
    logits.requires_grad_()
    log_probs, entropy = ours(logits, targets, 1.0, 32_000)
    assert log_probs.dtype == entropy.dtype == torch.float32
    log_probs.sum().backward()
    reference = logits.detach().double().requires_grad_()
    want_log_probs, want_entropy = exact(reference, targets, 1.0, 32_000)
    want_log_probs.sum().backward()
    assert (log_probs - want_log_probs).abs().max() < 1e-5
    assert (entropy - want_entropy).abs().max() < 1e-5
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=2**-8 + 1e-5, atol=1e-12)


def test_rounding_logits_to_bf16_costs_what_the_docstring_says() -> None:
    logits, targets = make((256,), 4096, 4096, scale=4.0)
    rounded, _ = ours(logits.bfloat16(), targets, 1.0, 4096)
    original, _ = exact(logits, targets, 1.0, 4096)
    error = (rounded - original).abs().max().item()
    assert 1e-3 < error < 2**-9 * logits.abs().max().item() * 2


def test_temperature_is_that_of_the_sampler() -> None:
    logits, targets = make((4,), 9, 9)
    hot, _ = ours(logits, targets, 2.0, 9)
    halved, _ = ours(logits / 2, targets, 1.0, 9)
    torch.testing.assert_close(hot, halved, rtol=1e-13, atol=0)


def saved(logits: torch.Tensor, targets: torch.Tensor, with_entropy: bool = True):
    """Return the tensors that autograd keeps."""
    kept = []

    def pack(tensor: torch.Tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = ours(logits, targets, 0.9, logits.shape[-1], with_entropy)
    return kept, result


def test_autograd_keeps_the_logits_and_no_float32_copy() -> None:
    logits, targets = make((40,), 64, 64, torch.bfloat16)
    kept, _ = saved(logits.requires_grad_(), targets)
    assert [t.dtype for t in kept if t.numel() >= logits.numel()] == [torch.bfloat16]
    assert any(t.data_ptr() == logits.data_ptr() for t in kept)
    assert sum(t.numel() for t in kept) <= logits.numel() + 3 * targets.numel()


def test_nothing_is_kept_without_a_gradient() -> None:
    logits, targets = make((40,), 64, 64, torch.float32)
    with torch.no_grad():
        kept, (log_probs, entropy) = saved(logits.requires_grad_(), targets)
    assert not kept and not log_probs.requires_grad and not entropy.requires_grad
    kept, (log_probs, entropy) = saved(logits.detach(), targets, with_entropy=False)
    assert not kept and not log_probs.requires_grad and entropy is None


def test_detached_entropy_changes_no_gradient() -> None:
    logits, targets = make((6,), 8, 8, torch.float32)
    gradients = []
    for with_entropy in (False, True):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = ours(leaf, targets, 1.0, 8, with_entropy)
        loss = log_probs.sum() if entropy is None else log_probs.sum() + entropy.detach().sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


def test_logits_that_are_not_contiguous() -> None:
    logits, targets = make((5, 4), 8, 8)
    view = logits.transpose(0, 1)[:, :-1].requires_grad_()  # [4, 4, 8]
    targets = targets.t()[:, :-1]
    log_probs, _ = ours(view, targets, 1.0, 8)
    torch.testing.assert_close(log_probs, exact(view, targets, 1.0, 8)[0], rtol=1e-12, atol=0)
    got = torch.autograd.grad(log_probs.sum(), view)[0]
    want = torch.autograd.grad(exact(view, targets, 1.0, 8)[0].sum(), view)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_no_rows() -> None:
    logits = torch.zeros(0, 8, requires_grad=True)
    log_probs, entropy = ours(logits, torch.zeros(0, dtype=torch.int64), 1.0, 8)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,) and logits.grad.shape == (0, 8)


def test_what_cannot_be_is_an_error() -> None:
    logits, targets = make((2,), 8, 8)
    with pytest.raises(ValueError, match=r"rollout.sampling.temperature"):
        ours(logits, targets, 0.0, 8)
    with pytest.raises(ValueError, match="vocab_size is 9"):
        ours(logits, targets, 1.0, 9)
