"""Sections of the data files and of how their rows are read, one for each kind of row."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hetero_ppo.config.schema.choices import OverlongPrompts
from hetero_ppo.config.schema.option import OnResume, option

#: Endings of the names of data files.
DATA_SUFFIXES = (".jsonl", ".parquet")


@dataclass
class DataConfig:
    """Options that every kind of row has: files, chat template, order and the treatment of rows that are too long."""

    train: str = option(MISSING, "File of training rows", endings=DATA_SUFFIXES, resume=OnResume.content)
    eval: str | None = option(
        None, "File of held-out rows; null: no evaluation", endings=DATA_SUFFIXES, resume=OnResume.applied
    )
    prompt_key: str = option("prompt", "Column of the prompt", resume=OnResume.content)
    tools_key: str = option(
        "tools",
        "Column of the tools that messages may call, for the chat template: a list, or its JSON as text",
        resume=OnResume.content,
    )
    chat_template: str | None = option(
        None, "Jinja file that replaces the chat template of the tokenizer", resume=OnResume.content
    )
    apply_chat_template: bool = option(
        True,
        "Rows go through the chat template; false: prompt and answer are tokenised as they stand and concatenated",
        resume=OnResume.content,
    )
    overlong_prompts: OverlongPrompts = option(
        OverlongPrompts.error, "Treatment of a row that is too long", resume=OnResume.content
    )
    shuffle: bool = option(True, "Rows come in a new random order in every epoch", resume=OnResume.objective)

    @property
    def sequences_per_row(self) -> int:
        """Number of sequences that one row gives a forward; a micro-batch holds all of them or none."""
        return 1


@dataclass
class AnsweredDataConfig(DataConfig):
    """Rows that hold prompts with their answers."""

    max_sequence_tokens: int = option(
        1024, "Longest prompt and answer together", unit="tokens", minimum=2, resume=OnResume.content
    )


@dataclass
class SftDataConfig(AnsweredDataConfig):
    """Rows of SFT: conversations, or prompts with completions."""

    messages_key: str = option(
        "messages", "Column of the conversation, in which every assistant message is an answer", resume=OnResume.content
    )
    completion_key: str = option(
        "completion", "Column of the answer to prompt_key, for rows without messages_key", resume=OnResume.content
    )

    @property
    def row_unit(self) -> str:
        """Name of its rows in the plural."""
        return "examples"


@dataclass
class PreferenceDataConfig(AnsweredDataConfig):
    """Rows of preference pairs: a better and a worse answer."""

    chosen_key: str = option("chosen", "Column of the better answer", resume=OnResume.content)
    rejected_key: str = option("rejected", "Column of the worse answer", resume=OnResume.content)

    @property
    def row_unit(self) -> str:
        """Name of its rows in the plural."""
        return "pairs"

    @property
    def sequences_per_row(self) -> int:
        """Number of sequences that one row gives a forward; a micro-batch holds all of them or none."""
        return 2


@dataclass
class PromptDataConfig(DataConfig):
    """Rows of PPO: prompts, with what functions need to score their responses."""

    messages_key: str = option(
        "messages", "Column of the messages that are the prompt, for rows without prompt_key", resume=OnResume.content
    )
    label_key: str = option("label", "Column of the label that functions get", resume=OnResume.content)
    metadata_key: str = option("metadata", "Column of the metadata that functions get", resume=OnResume.content)
    max_prompt_tokens: int = option(512, "Longest prompt", unit="tokens", minimum=1, resume=OnResume.content)
