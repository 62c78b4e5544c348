"""Checkpoints of a real run: the one that is asked for is loaded to the bit, and one that can't be is refused with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.helpers.chain import Chain, launch_all
from tests.e2e.test_resume import assert_same_weights, results
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def runs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``straight`` over recorded rollouts, ``resumed`` from its second step, and runs that must not start."""
    return make_runs(chain, tmp_path_factory.mktemp("recovery"))


def make_runs(chain: Chain, root: Path) -> Path:
    replay = {"train__replay_rollouts": chain.run_dir("ppo") / "rollouts"}
    straight, damaged = root / "straight", root / "damaged"
    other, relabelled = root / "prompts.jsonl", root / "labels.jsonl"
    lines = (chain.data / "prompts.jsonl").read_text().splitlines(keepends=True)
    other.write_text("".join(sorted(lines)))
    relabelled.write_text("".join([json.dumps(json.loads(lines[0]) | {"label": "another"}) + "\n", *lines[1:]]))
    moved, replaced = root / "moved", root / "replaced"
    shutil.copytree(chain.export("sft"), moved)
    shutil.copytree(chain.export("rm"), replaced)
    tensors = load_file(replaced / "model.safetensors")
    tensors["score.weight"] *= 2
    save_file(tensors, replaced / "model.safetensors", metadata={"format": "pt"})

    def command(name: str, **overrides: object) -> list[str]:
        return chain.train_command("ppo", root / name, **replay, **overrides)

    log = launch_all(
        1,
        [
            command("straight", checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_best="-critic/lr"),
            command("resumed", checkpoint__load=straight, checkpoint__step=2, reference__model__path=moved),
            ["!", *command("other_data", checkpoint__load=straight, checkpoint__step=2, data__train=other)],
            ["!", *command("other_labels", checkpoint__load=straight, data__train=relabelled)],
            ["!", *command("other_weights", checkpoint__load=straight, reward_model__model__path=replaced)],
            ["!", *command("other_objective", checkpoint__load=straight, algorithm__gamma=0.5)],
            ["!", *command("no_such_step", checkpoint__load=straight, checkpoint__step=9)],
        ],
    )
    shutil.copytree(straight / "checkpoints", damaged / "checkpoints")
    weights = max(
        (damaged / "checkpoints" / "iter_0000002" / "actor").glob("*.distcp"), key=lambda path: path.stat().st_size
    )
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    log += launch_all(1, [["!", *command("from_damaged", checkpoint__load=damaged, checkpoint__step=2)]])
    (root / "log").write_text(log)
    return root


def test_any_kept_checkpoint_goes_on_to_the_same_bits(runs: Path) -> None:
    straight, resumed = results(runs / "straight"), results(runs / "resumed")
    assert list(resumed) == [STEPS]
    assert resumed[STEPS] == straight[STEPS]
    assert_same_weights(runs / "resumed" / "hf", runs / "straight" / "hf")


def test_what_differs_is_printed(runs: Path, chain: Chain) -> None:
    text = (runs / "log").read_text()
    assert f"  reference.model.path: {chain.export('sft')} -> {runs / 'moved'} (compared by content" in text


def test_a_checkpoint_says_what_made_it(runs: Path) -> None:
    folder = runs / "straight" / "checkpoints" / "iter_0000003"
    state = json.loads((folder / "trainer.json").read_text())
    assert {
        "step",
        "world_size",
        "code_version",
        "metrics",
        "prompts",
        "kl_controller",
        "score_moments",
        "chunk_size",
    } <= set(state)
    assert (
        state["run_id"] and state["begun"] and set(state["inputs"]) >= {"data.train", "reference.model.path (weights)"}
    )
    assert state["health"]["checks"] == {"first_values": {}}  # recorded rollouts have no bounds
    assert len(state["template_sha256"]) in (4, 64)
    assert (folder / "config.yaml").read_text() == (runs / "straight" / "config.yaml").read_text()
    assert [path.name for path in (folder / "rng").iterdir()] == ["rank_00000.json"]
    names = sorted(path.name for path in folder.parent.iterdir())
    # Nothing half-written is left.
    assert names == ["exported_iteration.txt", "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize(
    "message",
    [
        "the content of data.train, data.train (labels and metadata) is not that of",
        "the content of data.train (labels and metadata) is not that of",
        "the content of reward_model.model.path (weights) is not that of",
        "this run has another objective than",
        "algorithm.gamma: 1.0 -> 0.5. Set the old values, or, if the change is intended, checkpoint.allow_changes=[algorithm.gamma]",
        "no complete checkpoint of step 9; there are: 2, 3",
        "other contents than were written (CRC-32). The last good one is iter_0000003: continue from it with checkpoint.step=3",
    ],
)
def test_what_cannot_be_loaded_is_refused(runs: Path, message: str) -> None:
    assert (runs / "log").read_text().count(message) == 1
