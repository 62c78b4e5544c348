"""Do the work of ``benchmarks/ppo_step.py`` with TRL's PPOTrainer (``trl.experimental.ppo``).

This program runs in its own environment, which has TRL but not this project; ``ppo_step.py --peer trl`` makes it. TRL's
code is not changed: phases are timed where the trainer calls its own ``batch_generation`` and ``forward``.

TRL differs from this project in three ways, all of which mean less work for TRL. The old log-probs are those of the generation, so
there is no forward for them. Gradients are not clipped. Its accelerator accumulates the gradients of all minibatches, so a PPO
step of four minibatches has one optimizer step. ``--step-every-minibatch`` makes it four.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PhaseClock(TrainerCallback):
    """Clock of generation, forwards and training of every PPO step, in seconds.

    A step lasts from the end of the step before to its own end. Training starts at the first ``forward`` under autograd. The
    time between the generation and training is that of the forwards (TRL's advantages and garbage collection included). The
    time before the generation is ``other``.
    """

    def __init__(self, response_tokens: int) -> None:
        self._response_tokens = response_tokens
        self._step_start = 0.0
        self._generation_start = 0.0
        self._generation_end = 0.0
        self._training_start: float | None = None
        self.steps: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training_start is None:
            raise RuntimeError(
                "the PPO step ended without a forward under autograd: this TRL does not train as expected"
            )
        now = time.perf_counter()
        self.steps.append(
            {
                "generation": self._generation_end - self._generation_start,
                "forwards": self._training_start - self._generation_end,
                "training": now - self._training_start,
                "other": self._generation_start - self._step_start,
                "total": now - self._step_start,
            }
        )
        self._training_start = None
        self._step_start = now

    def timed_generation(self, batch_generation: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``batch_generation`` so that its start and end are noted. The wrapper raises ValueError for a response that is too short."""

        def generation(model: torch.nn.Module, queries: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self._generation_start = time.perf_counter()
            query_responses, logits = batch_generation(model, queries, *args)
            self._generation_end = time.perf_counter()
            made = query_responses.shape[1] - queries.shape[1]
            if made != self._response_tokens:
                raise ValueError(f"TRL generated {made} tokens per response, the work asks for {self._response_tokens}")
            return query_responses, logits

        return generation

    def timed_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``forward`` so that a step's first call under autograd is noted."""

        def first_noted(model: torch.nn.Module, *args: Any) -> Any:
            if self._training_start is None and torch.is_grad_enabled():
                self._training_start = time.perf_counter()
            return forward(model, *args)

        return first_noted


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Dataset:
    """Read the prompts of a JSONL file as token ids. Raise ValueError for one that has not ``prompt_tokens`` tokens."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        ids = tokenizer(json.loads(line)["prompt"])["input_ids"]
        if len(ids) != prompt_tokens:
            raise ValueError(f"{path}, line {number}: {len(ids)} tokens, the work asks for {prompt_tokens}")
        rows.append({"input_ids": ids})
    return Dataset.from_list(rows)


def build_trainer(args: argparse.Namespace, output_dir: str, clock: PhaseClock) -> PPOTrainer:
    dtype = DTYPES[args.dtype]

    def scored(path: str) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)

    tokenizer = AutoTokenizer.from_pretrained(args.actor)
    # An id past the models' vocabulary: no sampled token is mistaken for padding, so every response counts in full.
    tokenizer.add_special_tokens({"pad_token": "<|peer_padding|>"})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = PPOConfig(
        output_dir=output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # the models are loaded in the dtype of the work
        seed=args.seed,
        total_episodes=args.prompts_per_step * (args.warmup + args.steps),
        num_ppo_epochs=1,
        num_mini_batches=args.prompts_per_step // args.minibatch,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.prompts_per_step // (args.micro_batch * processes),
        local_rollout_forward_batch_size=args.forward_batch,
        response_length=args.response_tokens,
        stop_token=None,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_steps=1_000_000,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(args.actor, dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(args.reference, dtype=dtype),
        reward_model=scored(args.reward),
        value_model=scored(args.critic),
        train_dataset=read_prompts(Path(args.prompts), tokenizer, args.prompt_tokens),
        eval_dataset=None,
        callbacks=[clock],
    )
    if args.step_every_minibatch:
        trainer.accelerator.gradient_accumulation_steps = args.minibatch // (args.micro_batch * processes)
    return trainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for role in ("actor", "critic", "reference", "reward"):
        parser.add_argument(f"--{role}", required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--prompts", required=True, help="JSONL file, one object with the key `prompt` per line")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="PPO steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="PPO steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts-per-step", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16, help="per_device_train_batch_size, of one process")
    parser.add_argument("--forward-batch", type=int, default=64, help="local_rollout_forward_batch_size, same")
    parser.add_argument("--step-every-minibatch", action="store_true", help="optimizer step after every minibatch")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    clock = PhaseClock(args.response_tokens)
    ppo_trainer.batch_generation = clock.timed_generation(ppo_trainer.batch_generation)
    ppo_trainer.forward = clock.timed_forward(ppo_trainer.forward)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(args, output_dir, clock)
        num_parameters = sum(parameter.numel() for parameter in trainer.policy_model.parameters())
        trainer.train()
    if not trainer.is_world_process_zero():
        return
    result = {
        "system": "trl",
        "version": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": args.dtype,
        "threads": args.threads,
        "num_parameters": num_parameters,
        "steps": clock.steps[args.warmup :],
    }
    Path(args.json).write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
