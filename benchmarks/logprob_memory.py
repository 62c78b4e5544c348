"""Compare the peak memory of two ways to compute log-probs: ours, in slices of the logits in their own dtype, and the plain one.

The plain way is ``logits.float().log_softmax(-1).gather(...)``, with its float32 copy. Both run forward alone (old log-probs, reference)
and with the backward pass to the logits (training of the actor). The peak is the memory that each allocates in addition to the logits.

    python benchmarks/logprob_memory.py --tokens 2048 --vocab 32768 --dtype bf16 --json logprob_memory.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hetero_ppo.distributed.vocab_parallel import vocab_parallel_log_probs
from hetero_ppo.table import render_table

MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure(
    tokens: int = 1024, vocab_size: int = 32_768, dtype: str = "bf16", *, with_entropy: bool = False
) -> dict[str, Any]:
    """Measure the peak bytes of both ways, and their ratios.

    Args:
        tokens: Number of rows of the logits. A slice of ours has 1 MiB on a CPU and 256 MiB on a GPU: logits should be much larger.
        vocab_size: Number of columns of the logits.
        dtype: Name of the logits' dtype, "bf16" or "fp32".
        with_entropy: True to compute the entropies in our way too.

    Returns:
        The bytes, and ``logprob_peak_ratio``: ours over plain, the larger of ``forward_ratio`` and ``training_ratio``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab_size, generator=generator).to(device, DTYPES[dtype])
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator).to(device)

    def ours(given: Tensor) -> Tensor:
        log_probs, _ = vocab_parallel_log_probs(
            given, targets, temperature=1.0, vocab_size=vocab_size, tp_group=None, with_entropy=with_entropy
        )
        return log_probs

    def plain(given: Tensor) -> Tensor:
        return given.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    bytes_of: dict[str, int] = {}
    for name, function in (("ours", ours), ("plain", plain)):
        bytes_of[f"{name}_forward_bytes"] = _peak_bytes(partial(_forward, function, logits))
        bytes_of[f"{name}_training_bytes"] = _peak_bytes(partial(_training, function, logits))
    forward, training = (
        bytes_of[f"ours_{part}_bytes"] / max(1, bytes_of[f"plain_{part}_bytes"]) for part in ("forward", "training")
    )
    return {
        "logprob_peak_ratio": max(forward, training),
        "forward_ratio": forward,
        "training_ratio": training,
        "logits_bytes": logits.nbytes,
        **bytes_of,
        "tokens": tokens,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "with_entropy": with_entropy,
        "device": device.type,
    }


def _forward(function: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    with torch.no_grad():
        function(logits)


def _training(function: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    function(logits.detach().requires_grad_()).sum().backward()


def _peak_bytes(work: Callable[[], None]) -> int:
    """Return the largest number of bytes that ``work`` allocates and holds at a time, as torch's allocator reports it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(0, *accumulate(size for _, size in changes))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="number of rows of the logits")
    parser.add_argument("--vocab", type=int, default=32_768, help="number of columns of the logits")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the logits")
    parser.add_argument("--entropy", action="store_true", help="compute entropies in our way too")
    args = parser.parse_args()
    result = measure(args.tokens, args.vocab, args.dtype, with_entropy=args.entropy)
    rows = [["", "ours, MiB", "plain, MiB", "ratio"]]
    for part in ("forward", "training"):
        sizes = [f"{result[f'{name}_{part}_bytes'] / MIB:.1f}" for name in ("ours", "plain")]
        rows.append([part, *sizes, f"{result[f'{part}_ratio']:.3f}"])
    title = f"{args.tokens} x {args.vocab} {args.dtype} logits: {result['logits_bytes'] / MIB:.1f} MiB"
    harness.report("logprob_memory", result, args.json, text="\n".join([title, render_table(rows, "lrrr")]))


if __name__ == "__main__":
    main()
