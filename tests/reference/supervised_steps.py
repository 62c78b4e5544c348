"""Steps of SFT and of a reward model in plain torch and transformers, to compare runs of this project with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tests.reference.plain_models import Trained, load, log_probs_and_entropy, padded, scalars
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Row = dict[str, Any]


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Encode a conversation in ChatML. Return token ids, and which of them SFT learns: every assistant's answer and the end of its turn."""
    ids: list[int] = []
    learned: list[bool] = []
    for number, message in enumerate(messages):
        start = ("\n" if number else "") + f"<|im_start|>{message['role']}\n"
        for text, is_answer in ((start, False), (message["content"] + "<|im_end|>", message["role"] == "assistant")):
            part = tokenizer.encode(text, add_special_tokens=False)
            ids += part
            learned += [is_answer] * len(part)
    return ids, learned


class Supervised:
    """A model that learns from rows in their file's order."""

    def __init__(self, config: SimpleNamespace) -> None:
        self.config = config
        self.is_sft = config.kind == "sft"
        role = config.actor if self.is_sft else config.reward
        self.tokenizer = AutoTokenizer.from_pretrained(role.model.path)
        self.trained = Trained(load(role.model.path, self.is_sft), role.optimizer, config.train.steps)
        self.rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]

    def step(self) -> dict[str, float]:
        """Update on the next rows. Return the metrics."""
        size, done = self.config.train.global_batch_size, self.trained.steps
        loss, metrics = self.loss(self.rows[done * size : (done + 1) * size])
        norm, rate = self.trained.step(loss)
        metrics |= {"train/loss": float(loss.detach()), "train/grad_norm": norm, "train/lr": rate}
        return {**metrics, "train/skipped_steps": 0}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics on the held-out rows."""
        _, metrics = self.loss([json.loads(line) for line in Path(self.config.data.eval).read_text().splitlines()])
        return {f"eval/{name.partition('/')[2]}": value for name, value in metrics.items()}

    def loss(self, rows: list[Row]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss over all learned tokens, or over all pairs."""
        return self.sft_loss(rows) if self.is_sft else self.pair_loss(rows)

    def sft_loss(self, rows: list[Row]) -> tuple[Tensor, dict[str, float]]:
        encoded = [encode(row["messages"], self.tokenizer) for row in rows]
        log_probs, _ = log_probs_and_entropy(self.trained.model, padded([ids for ids, _ in encoded]), 1.0)
        chosen = [log_probs[i, t - 1] for i, (_, learned) in enumerate(encoded) for t, on in enumerate(learned) if on]
        loss = -torch.stack(chosen).mean()
        return loss, {"sft/loss": float(loss.detach())}

    def pair_loss(self, rows: list[Row]) -> tuple[Tensor, dict[str, float]]:
        """Compute the pair loss: Ouyang et al. 2022, equation 1, with the margin of Touvron et al. 2023, and squared scores."""
        chosen, rejected = (self.scores(rows, side) for side in ("chosen", "rejected"))
        pair_loss = -F.logsigmoid(chosen - rejected - self.config.loss.margin).mean()
        squares = (chosen.square() + rejected.square()).mean() / 2
        metrics = {
            "rm/loss": pair_loss,
            "rm/accuracy": (chosen > rejected).double().mean(),
            "rm/score_margin": (chosen - rejected).mean(),
            "rm/chosen_score": chosen.mean(),
            "rm/rejected_score": rejected.mean(),
        }
        loss = pair_loss + self.config.loss.score_l2 * squares
        return loss, {name: float(value.detach()) for name, value in metrics.items()}

    def scores(self, rows: list[Row], side: str) -> Tensor:
        """Return the [rows] scores of the head at each sequence's last token."""
        conversations = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for row in rows
        ]
        ids = [encode(messages, self.tokenizer)[0] for messages in conversations]
        outputs = scalars(self.trained.model, padded(ids))
        return torch.stack([row[len(sequence) - 1] for row, sequence in zip(outputs, ids)])
