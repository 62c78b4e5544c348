"""What the GPU checks compute on: a world of one rank, random models, and another process that takes device memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch


@contextlib.contextmanager
def world() -> Iterator[None]:
    """Make this process the one rank of a world."""
    from hetero_ppo.distributed.groups import finish, initialise

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    initialise(2.0)
    yield
    finish()


def save_model(folder: Path, *, layers: int, hidden: int, vocab: int, heads: int = 8, groups: int = 4) -> Any:
    """Save a random Qwen3 in fp32 and return it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model


class Neighbour:
    """Another process on the device, which takes memory from the driver as a rollout server does."""

    PROGRAM = """
import sys, torch
held = None
torch.cuda.init()
print("ready", flush=True)
for line in sys.stdin:
    held = None
    torch.cuda.empty_cache()
    try:
        held = torch.empty(int(line), dtype=torch.uint8, device="cuda")
        print("ok", flush=True)
    except torch.OutOfMemoryError as error:
        print("refused: " + str(error).splitlines()[0], flush=True)
"""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def hold(self, num_bytes: int) -> str:
        """Hold so many bytes in place of what it held; return "ok", or why not."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_bytes}\n")
        self._process.stdin.flush()
        return self._read()
