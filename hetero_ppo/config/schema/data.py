"""Section of the data files and of how their rows are read."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hetero_ppo.config.schema.choices import OverlongPrompts
from hetero_ppo.config.schema.option import option


@dataclass
class DataConfig:
    """Data files, names of their columns, chat template and length limits."""

    train: str = option(MISSING, "Training rows, a .jsonl or .parquet file")
    eval: str | None = option(None, "Held-out rows in the same format; null: no evaluation")
    messages_key: str = option("messages", "Column of the conversation")
    prompt_key: str = option("prompt", "Column of the prompt")
    completion_key: str = option("completion", "Column of the answer to prompt_key, for SFT rows without messages_key")
    chosen_key: str = option("chosen", "Column of the better answer")
    rejected_key: str = option("rejected", "Column of the worse answer")
    label_key: str = option("label", "Column of the label that functions get")
    metadata_key: str = option("metadata", "Column of the metadata that functions get")
    tools_key: str = option(
        "tools", "Column of the tools that messages may call, for the chat template: a list, or its JSON as text"
    )
    chat_template: str | None = option(None, "Jinja file that replaces the chat template of the tokenizer")
    apply_chat_template: bool = option(
        True, "Rows go through the chat template; false: prompt and answer are tokenised as they stand and concatenated"
    )
    max_prompt_tokens: int = option(512, "Longest prompt", unit="tokens", minimum=1)
    max_sequence_tokens: int = option(1024, "Longest prompt and answer together", unit="tokens", minimum=2)
    overlong_prompts: OverlongPrompts = option(OverlongPrompts.error, "Treatment of a row that is too long")
    shuffle: bool = option(True, "Rows come in a new random order in every epoch")
