"""Measure whether a reward model's scores have the same bits wherever they are computed, and what that costs.

A small reward model is trained on pairs. It then scores the held-out sequences with tensor parallelism 1, 2 and 4 and again in a new
process, in four batchings of three paddings each, in fp32 and bf16, with the aligned forward and with the plain one. All scores are
compared with those of one process. The seconds are the processor time of one forward in one process, the two paths in turn.

    python benchmarks/rm_alignment.py --reviews <folder with positive.txt and negative.txt> --json alignment.json

Without --reviews the pairs are generated: token ids of two classes. Words of reviews become ids by a hash, without a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from hetero_ppo.config.schema import (
    Dtype,
    LrSchedule,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelLossConfig,
    TrainedRoleConfig,
)
from hetero_ppo.data.collate import collate_preferences, pad_right
from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import reward_loss_fn
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import scores_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.table import render_table
from hetero_ppo.types import Microbatch

VOCAB = 4096
DTYPES = ("fp32", "bf16")
#: Name -> layers, hidden size, MLP size, heads, key-value heads.
SHAPES = {
    "tiny": (2, 52, 100, 4, 4),
    "1m": (4, 128, 384, 4, 2),
    "10m": (4, 256, 768, 8, 4),
    "30m": (8, 512, 1536, 8, 4),
    "125m": (12, 768, 2048, 12, 4),
}
#: Name -> number of rows of a micro-batch, order of the rows.
BATCHINGS: dict[str, tuple[int, str]] = {
    "one row": (1, "as it comes"),
    "four rows": (4, "as it comes"),
    "sixteen rows of one length": (16, "sorted"),
    "all rows": (10**9, "reversed"),
}
PADDINGS = (0, 13, 64)  # number of tokens after the longest sequence of a micro-batch
#: Number of processes of a launch -> its layouts.
LAUNCHES: dict[int, dict[str, dict[str, Any]]] = {
    4: {
        "TP 1": {},
        "TP 1, packed": {"packing": True},
        "TP 2, sequence parallel": {"tensor": 2, "sequence": True},
        "TP 4": {"tensor": 4},
    },
    1: {"fresh process": {}},
}


def review_pairs(folder: Path, seed: int) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Read training pairs and held-out pairs, each of a positive and a negative review."""
    random_numbers = random.Random(seed)
    sides = []
    for name in ("positive.txt", "negative.txt"):
        lines = [line.split() for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]
        random_numbers.shuffle(lines)
        sides.append([[2 + zlib.crc32(word.encode()) % (VOCAB - 2) for word in words[:120]] + [1] for words in lines])
    pairs = [PreferenceExample(chosen, rejected, 0) for chosen, rejected in zip(*sides)]
    return pairs[600:], pairs[:600]


def generated_pairs(seed: int) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Generate training pairs and held-out pairs of random ids. A chosen sequence has more ids of the lower half."""
    random_numbers = random.Random(seed)

    def sequence(share: float) -> list[int]:
        half = VOCAB // 2
        length = random_numbers.randint(4, 60)
        return [
            random_numbers.randrange(2, half) + (random_numbers.random() > share) * (half - 2) for _ in range(length)
        ] + [1]

    pairs = [PreferenceExample(sequence(0.65), sequence(0.35), 0) for _ in range(2200)]
    return pairs[600:], pairs[:600]


def save_model(shape: str, folder: Path) -> None:
    layers, hidden, mlp, heads, groups = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads + hidden // heads % 2,
        max_position_embeddings=2048,
        num_labels=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def role(model: str, dtype: str, aligned: bool, layout: dict[str, Any], rows: int = 32) -> TrainedRoleConfig:
    return TrainedRoleConfig(
        model=ModelConfig(path=model, dtype=Dtype(dtype)),
        parallel=ParallelConfig(**{name: value for name, value in layout.items() if name != "packing"}),
        packing=layout.get("packing", False),
        micro_batch_size=rows,
        aligned=aligned,
        optimizer=OptimizerConfig(lr=1e-3, lr_schedule=LrSchedule.cosine, warmup_steps=10, weight_decay=0.1),
    )


def train(model: Path, out: Path, pairs: list[PreferenceExample], steps: int) -> None:
    """Train a reward model on random batches of 32 pairs with the aligned forward, and export it to ``out``."""
    engine = TrainEngine("reward", role(str(model), "fp32", True, {"packing": True}), "score", steps)
    loss_fn, random_numbers = reward_loss_fn(RewardModelLossConfig()), random.Random(0)
    for _ in range(steps):
        batch = collate_preferences(random_numbers.sample(pairs, 32))
        engine.train_step([LossTerm(engine.pair_microbatches(batch), loss_fn, 32)])
    engine.model.export(str(out))


def microbatches(
    sequences: list[list[int]], batching: str, padding: int, multiple: int
) -> list[tuple[list[int], Microbatch]]:
    """Return the micro-batches of a batching, each with the rows in it."""
    size, order = BATCHINGS[batching]
    rows = list(range(len(sequences)))
    if order == "sorted":
        rows.sort(key=lambda row: len(sequences[row]))
    elif order == "reversed":
        rows.reverse()
    parts = []
    for start in range(0, len(rows), size):
        taken = rows[start : start + size]
        ids, lengths = pad_right([sequences[row] for row in taken])
        width = ids.shape[1] + padding
        ids = torch.nn.functional.pad(ids, (0, width + -width % multiple - ids.shape[1]))
        # Padding is computed where its outputs are asked for.
        parts.append(
            (taken, Microbatch(ids, lengths, output_mask=torch.ones_like(ids, dtype=torch.bool) if padding else None))
        )
    return parts


def all_scores(engine: ModelEngine, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Return the [B] float32 scores of every "batching, padding". The first data-parallel rank computes all rows, the others none."""
    if engine.groups.dp.rank() > 0:
        return {}
    found = {}
    for batching in BATCHINGS:
        for padding in PADDINGS:
            parts = microbatches(sequences, batching, padding, engine.forward_size.length_multiple)
            with torch.no_grad():
                outputs = engine.run_schedule(engine.models, [m for _, m in parts], scores_output, forward_only=True)
            scores = torch.empty(len(sequences))
            for (rows, _), output in zip(parts, outputs):
                scores[rows] = output
            found[f"{batching}, {padding}"] = scores
    return found


def work(job_file: str) -> None:
    """Score in one process of a launch, in every layout, dtype and path. Rank 0 saves the scores."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    initialise(10.0)
    scores: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, layout in LAUNCHES[int(os.environ["WORLD_SIZE"])].items():
        scores[name] = {}
        for dtype in DTYPES:
            for aligned in (True, False):
                engine = ModelEngine("reward", role(job["model"], dtype, aligned, layout), "score")
                scores[name][f"{dtype}, {aligned}"] = all_scores(engine, job["sequences"])
    if int(os.environ["RANK"]) == 0:
        torch.save(scores, job["out"])
    finish()


def launch(
    processes: int, model: Path, sequences: list[list[int]], folder: Path
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Score in new processes. Return the scores by layout, by dtype and path, and by batching."""
    job, out = folder / f"{processes}.json", folder / f"{processes}.pt"
    job.write_text(json.dumps({"model": str(model), "sequences": sequences, "out": str(out)}))
    command = [sys.executable, "-W", "ignore", "-m", "hetero_ppo.cli.launcher", "--standalone"]
    subprocess.run(
        [*command, f"--nproc-per-node={processes}", __file__, "--job", str(job)],
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    return torch.load(out, weights_only=True)


def compare(by_world: dict[str, dict[str, dict[str, Tensor]]], path: str) -> dict[str, int]:
    """Count the scores of one dtype and path that differ from the first, and their bits, over all layouts and batchings."""
    first = next(iter(by_world["TP 1"][path].values()))
    counts = {"num_scores": 0, "mismatched_scores": 0, "mismatched_bits": 0}
    for world in by_world.values():
        for scores in world[path].values():
            differ = scores.view(torch.int32) ^ first.view(torch.int32)
            counts["num_scores"] += len(scores)
            counts["mismatched_scores"] += int((differ != 0).sum())
            counts["mismatched_bits"] += sum((int(x) & 0xFFFFFFFF).bit_count() for x in differ)
    return counts


def pair_accuracy(model: Path, dtype: str, aligned: bool, pairs: list[PreferenceExample]) -> float:
    """Return the share of pairs whose chosen sequence scores higher."""
    engine = ModelEngine("reward", role(str(model), dtype, aligned, {}), "score")
    batch = collate_preferences(pairs)
    chosen = engine.forward(batch.chosen_ids, batch.chosen_lengths, scores_output)
    rejected = engine.forward(batch.rejected_ids, batch.rejected_lengths, scores_output)
    return float((chosen > rejected).double().mean())


def forward_seconds(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of processor time of a forward of each path, the two in turn."""
    engines = {
        name: ModelEngine("reward", role(str(model), dtype, name == "aligned", {}, args.rows), "score")
        for name in ("aligned", "plain")
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (args.rows, args.tokens), generator=generator)
    lengths = torch.randint(args.tokens // 2, args.tokens + 1, (args.rows,), generator=generator)
    lengths[0] = args.tokens

    def timed(engine: ModelEngine) -> float:
        start = time.process_time()  # of all threads of this process, so that other work on the machine counts less
        engine.forward(ids, lengths, scores_output)
        return time.process_time() - start

    contenders = {name: lambda number, engine=engine: timed(engine) for name, engine in engines.items()}
    seconds = harness.alternate(contenders, args.repeats, num_warm_up=1)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_time(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the two paths' seconds alone, by dtype."""
    save_model(args.timed_shape, folder / "timed")
    with harness.one_rank():
        initialise(10.0)
        torch.set_num_threads(args.threads)
        found = {dtype: forward_seconds(folder / "timed", dtype, args) for dtype in DTYPES}
        finish()
    return {dtype: {**seconds, "time_ratio": seconds["aligned"] / seconds["plain"]} for dtype, seconds in found.items()}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    training, held_out = review_pairs(args.reviews, args.seed) if args.reviews else generated_pairs(args.seed)
    held_out = held_out[: args.pairs]
    save_model(args.trained_shape, folder / "start")
    save_model(args.timed_shape, folder / "timed")
    result: dict[str, Any] = {"dtypes": {}}
    with harness.one_rank():
        initialise(10.0)
        train(folder / "start", folder / "model", training, args.train_steps)
        torch.set_num_threads(args.threads)
        for dtype in DTYPES:
            seconds = forward_seconds(folder / "timed", dtype, args)
            accuracy = {name: pair_accuracy(folder / "model", dtype, name == "aligned", held_out) for name in seconds}
            result["dtypes"][dtype] = {"seconds": seconds, "accuracy": accuracy}
        finish()
    sequences = [ids for pair in held_out for ids in pair.all_ids][: args.sequences]
    by_world: dict[str, dict[str, dict[str, Tensor]]] = {}
    for processes in LAUNCHES:
        by_world |= launch(processes, folder / "model", sequences, folder)
    for dtype in DTYPES:
        found = result["dtypes"][dtype]
        found["aligned"] = compare(by_world, f"{dtype}, True")
        found["plain"] = compare(by_world, f"{dtype}, False")
        found["time_ratio"] = found["seconds"]["aligned"] / found["seconds"]["plain"]
    return result


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of all dtypes together: sums of counts, the larger time ratio, accuracies in bf16."""
    dtypes = result["dtypes"].values()
    accuracy = result["dtypes"]["bf16"]["accuracy"]
    return {
        "mismatched_bits_aligned": sum(found["aligned"]["mismatched_bits"] for found in dtypes),
        "mismatched_scores_plain": sum(found["plain"]["mismatched_scores"] for found in dtypes),
        "num_scores": sum(found["aligned"]["num_scores"] for found in dtypes),
        "time_ratio": max(found["time_ratio"] for found in dtypes),
        "accuracy_aligned": accuracy["aligned"],
        "accuracy_plain": accuracy["plain"],
    }


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the result for people."""
    rows = [["", "scores", "aligned", "plain", "seconds", "plain", "ratio", "accuracy", "plain"]]
    for dtype, found in result["dtypes"].items():
        counts = (found["aligned"]["num_scores"], *(found[path]["mismatched_scores"] for path in ("aligned", "plain")))
        seconds = (f"{found['seconds'][path]:.3f}" for path in ("aligned", "plain"))
        accuracy = (f"{found['accuracy'][path]:.3%}" for path in ("aligned", "plain"))
        rows.append([dtype, *map(str, counts), *seconds, f"{found['time_ratio']:.2f}", *accuracy])
    return (
        f"{render_table(rows, 'lrrrrrrrr')}\naligned, plain: number of scores whose bits differ from those of one process. seconds: processor time of "
        f"{args.rows} rows of {args.tokens // 2} to {args.tokens} tokens, model {args.timed_shape}, {args.threads} thread(s)."
    )


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--reviews", type=Path, help="folder with positive.txt and negative.txt, one review per line")
    parser.add_argument("--pairs", type=int, default=500, help="number of held-out pairs for the accuracy")
    parser.add_argument("--sequences", type=int, default=112, help="number of sequences scored in every combination")
    parser.add_argument("--train-steps", type=int, default=150, help="number of training steps of 32 pairs")
    parser.add_argument("--trained-shape", choices=SHAPES, default="10m", help="model that is trained and compared")
    parser.add_argument("--timed-shape", choices=SHAPES, default="30m", help="model whose forward is timed")
    parser.add_argument("--rows", type=int, default=16, help="number of rows of the timed forward")
    parser.add_argument("--tokens", type=int, default=256, help="longest row of the timed forward, in tokens")
    parser.add_argument("--repeats", type=int, default=7, help="number of timed forwards of each path")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads of the timed forward")
    parser.add_argument("--time-only", action="store_true", help="measure the forward's time and nothing else")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pairs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.job:
        work(args.job)
        return
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="rm-alignment-") as folder:
        if args.time_only:
            found = measure_time(args, Path(folder))
            rows = [["seconds", "aligned", "plain", "ratio"]]
            rows += [[dtype, *(f"{value:.3f}" for value in seconds.values())] for dtype, seconds in found.items()]
            harness.report("rm_alignment", found, args.json, text=render_table(rows, "lrrr"))
            return
        start = time.perf_counter()
        result = {**measure(args, Path(folder)), "minutes": (time.perf_counter() - start) / 60}
    details = {**result, "settings": harness.settings(args, without=["job"])}
    harness.report("rm_alignment", summary(result), args.json, text=table(result, args), details=details)


if __name__ == "__main__":
    main()
