"""Examples in files: the same as they were, in little memory, read once on a node."""

from __future__ import annotations

import gc
import json
import os
import queue
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.one_rank import ONE_RANK
from tests.helpers.data_fixtures import chatml_encoder, data_config, write_jsonl

from hetero_ppo.data import node_share
from hetero_ppo.data.collate import collate_prompts
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.node_share import NodeFiles
from hetero_ppo.data.preference import PreferenceCodec, PreferenceExample
from hetero_ppo.data.prompts import PromptCodec, PromptExample, load_prompts, user_message
from hetero_ppo.data.sft import SftCodec, SftExample, load_sft
from hetero_ppo.data.storage import Codec, ExampleWriter, StoredExamples

LABELS: list[Any] = [None, "päär 🍐", 3, 0.1, [1, {"a": None}], True]
CONVERSATION = [{"role": "system", "content": "sort"}, {"role": "user", "content": "ä\n"}]
TOOLS = [{"name": "f"}]


def prompt(messages: Any, text: str, label: Any, tools: Any = None) -> PromptExample:
    return PromptExample([1, 70_000, 3], text, messages, label, {"k": [1.5, "ü"]}, 7, tools)


@pytest.mark.parametrize(
    ("codec", "examples"),
    [
        (PromptCodec(True), [prompt(user_message("a"), "a", label) for label in LABELS]),
        (PromptCodec(True), [prompt(CONVERSATION, "ä\n", "x", TOOLS)]),
        (PromptCodec(False), [prompt(None, "plain", label) for label in LABELS]),
        (SftCodec(), [SftExample([5, 65_535, 0], [(1, 3)]), SftExample([2**31], [(0, 1), (0, 0)]), SftExample([], [])]),
        (PreferenceCodec(), [PreferenceExample([1, 2], [3], 1), PreferenceExample([65_536], [], 0)]),
    ],
)
def test_examples_come_back_as_they_were(tmp_path: Path, codec: Codec[Any], examples: list[Any]) -> None:
    with ExampleWriter(tmp_path, codec) as writer:
        for example in examples:
            writer.append(example)
    stored = StoredExamples(tmp_path, codec)
    for file in tmp_path.iterdir():
        file.unlink()
    assert list(stored) == examples and len(stored) == len(examples)
    assert [stored[-1], *stored[1:]] == [examples[-1], *examples[1:]]
    with pytest.raises(IndexError):
        stored[len(examples)]


def prompts_file(folder: Path, num_rows: int) -> str:
    rows = [
        {"prompt": f"sort these words: apple pear plum {n} " * 8, "label": n, "metadata": {"row": n}}
        for n in range(num_rows)
    ]
    return write_jsonl(folder / "prompts.jsonl", rows)


def test_prompts_take_less_memory_than_their_file(tmp_path: Path) -> None:
    encoder = chatml_encoder()
    load_prompts(prompts_file(tmp_path, 2), data_config(load_prompts), encoder)  # what is made once
    path = prompts_file(tmp_path, 1500)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    dataset = load_prompts(path, data_config(load_prompts), encoder)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(dataset) == 1500 and kept < 0.25 * Path(path).stat().st_size
    batch = collate_prompts([dataset.examples[row] for row in (499, 3)])
    assert batch.labels == [499, 3] and batch.metadata == [{"row": 499}, {"row": 3}] and batch.prompt_index == [499, 3]
    assert batch.prompt_messages[1] == user_message(batch.prompt_texts[1])
    assert batch.prompt_ids[0] == encoder.encode([encoder.render(batch.prompt_messages[0], True)])[0]


def node_of(num_ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[NodeFiles]:
    """Run the ranks of a node as threads, with a queue from rank 0 in place of a broadcast."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(node_share.tempfile, "tempdir", str(folder))
    folders: queue.SimpleQueue[str] = queue.SimpleQueue()

    def agree(rank: NodeFiles, own: str) -> str:
        if rank.local_rank > 0:
            return folders.get(timeout=60)
        for _ in range(num_ranks - 1):
            folders.put(own)
        return own

    monkeypatch.setattr(NodeFiles, "_agree", agree)
    ranks = [NodeFiles(ONE_RANK) for _ in range(num_ranks)]
    for number, rank in enumerate(ranks):
        rank.local_rank = number
    return ranks


def test_one_rank_of_a_node_reads_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, temporary = prompts_file(tmp_path, 30), tmp_path / "temporary"
    temporary.mkdir()
    ranks = node_of(3, temporary, monkeypatch)
    encoders = [chatml_encoder(), None, None]  # the others have no use for one

    def load(number: int) -> Dataset[PromptExample]:
        return load_prompts(
            path, data_config(load_prompts), encoders[number] or chatml_encoder("not used"), ranks[number]
        )

    with ThreadPoolExecutor(3) as pool:
        one, *others = pool.map(load, range(3))
    for other in others:
        assert list(other.examples) == list(one.examples) and other.fingerprint == one.fingerprint
        assert other.report == one.report
    assert one.fingerprint == load_prompts(path, data_config(load_prompts), chatml_encoder()).fingerprint
    assert not list(temporary.iterdir())


def test_files_of_a_killed_run_go_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    killed = "import os; from hetero_ppo.data.node_share import OWN_FILES; OWN_FILES.share(lambda folder: os.kill(os.getpid(), 9), str)"
    subprocess.run([sys.executable, "-c", killed], env={**os.environ, "TMPDIR": str(temporary)}, check=False)
    (left,) = temporary.iterdir()
    monkeypatch.setattr(node_share.tempfile, "tempdir", str(temporary))
    load_prompts(prompts_file(tmp_path, 2), data_config(load_prompts), chatml_encoder())
    assert not left.exists() and not list(temporary.iterdir())


@pytest.mark.parametrize("content", ['{"prompt": ""}\n', None])
def test_an_error_of_the_rank_that_reads_is_raised_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path, temporary = tmp_path / "a.jsonl", tmp_path / "temporary"
    temporary.mkdir()
    if content is not None:
        path.write_text(content)
    ranks = node_of(2, temporary, monkeypatch)

    def load(number: int) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_sft(str(path), data_config(load_sft), chatml_encoder(), ranks[number])
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(load, range(2))
    assert one == other and ("a.jsonl, line 1, field" in one or "does not exist" in one)
    assert not list(temporary.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: object, example: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExampleWriter, "append", full)
    path = write_jsonl(tmp_path / "a.jsonl", [json.loads('{"prompt": "a"}')])
    with pytest.raises(ValueError, match=r"a\.jsonl: no space for its tokens and texts in .*; set TMPDIR"):
        load_prompts(path, data_config(load_prompts), chatml_encoder())
