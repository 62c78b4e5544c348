"""Models by transformers and their updates by torch: what the references of this folder are made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def load(path: str, has_vocabulary: bool) -> torch.nn.Module:
    """Load a checkpoint in float32. A scalar head that it lacks is zero."""
    loader = AutoModelForCausalLM if has_vocabulary else AutoModelForSequenceClassification
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = loader.from_pretrained(path, **options, **({} if has_vocabulary else {"num_labels": 1}))
    if not has_vocabulary and "score.weight" in report["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
    return model


def padded(sequences: list[list[int]]) -> Tensor:
    """Pad on the right to [rows, S] int64. Under causal attention no token sees the padding."""
    return pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)


def log_probs_and_entropy(model: torch.nn.Module, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return [rows, S - 1] float64 log-probs and entropies of every token but the first, in the sampled distribution."""
    log_probs = (model(ids).logits[:, :-1] / temperature).log_softmax(dim=-1).double()
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, ids[:, 1:, None])[..., 0], entropy


def scalars(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the [rows, S] float64 outputs of a scalar head."""
    return model.score(model.model(ids).last_hidden_state)[..., 0].double()


class Trained:
    """A model, AdamW (Loshchilov and Hutter 2019) on it, and the learning rate's schedule."""

    def __init__(self, model: torch.nn.Module, config: SimpleNamespace, total_steps: int) -> None:
        self.model, self.config, self.total_steps, self.steps = model, config, total_steps, 0
        matrices = [p for p in model.parameters() if p.dim() > 1 or config.decay_norms_and_biases]
        others = [p for p in model.parameters() if p.dim() == 1 and not config.decay_norms_and_biases]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps)

    def learning_rate(self) -> float:
        """Return the learning rate: linear warm-up, then constant, or a decay that reaches ``min_lr`` one step after the last."""
        config, warmup = self.config, self.config.warmup_steps
        if self.steps < warmup:
            return config.lr * (self.steps + 1) / (warmup + 1)
        done = (self.steps - warmup) / (self.total_steps - warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]
        return config.lr if config.lr_schedule == "constant" else config.min_lr + (config.lr - config.min_lr) * left

    def step(self, loss: Tensor) -> tuple[float, float]:
        """Take an optimizer step. Return the gradient's norm before clipping, and the learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate()
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        self.adam.step()
        self.steps += 1
        return float(norm), self.adam.param_groups[0]["lr"]
