"""The uses of aligned roles, in one process: a first PPO update without a KL of its own, and golden scores that trace a difference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.helpers.aligned_cases import LENGTHS, role_config, save_models, sequences
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetero_ppo.cli.main import main
from hetero_ppo.config.schema import AlgorithmConfig, ResidencyConfig, TrainedRoleConfig
from hetero_ppo.data.collate import pad_right
from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.loss_terms import LossTerm, step_metrics
from hetero_ppo.engines.losses import actor_loss_fn
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import log_probs_output, scores_output, values_output
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.errors import RunError
from hetero_ppo.reward import self_check
from hetero_ppo.reward.golden import GOLDEN_FILE, GoldenGuard, golden_guard, make_golden, read_golden
from hetero_ppo.reward.self_check import check_alignment
from hetero_ppo.step.kinds import FORWARD
from hetero_ppo.trainers import reward_commands, roles
from hetero_ppo.trainers.rm import RewardModelTrainer
from hetero_ppo.trainers.roles import build_role
from hetero_ppo.types import PolicyInputs
from megatron_bridge.aligned import products


@pytest.fixture
def world() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        _one_rank(patch)
        initialise(2.0)
        yield
        finish()


def _one_rank(patch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        patch.setenv(name, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_first_update_is_on_policy_to_the_bit(world: None, models: Path, dtype: str) -> None:
    """Old log-probs of large padded micro-batches, training in packed small ones: ppo_kl is exactly 0."""
    assert _first_ppo_kl(role_config(models / "qwen2-lm", dtype, {}, aligned=True)) == 0.0


def test_first_update_is_not_without_aligned(world: None, models: Path) -> None:
    assert _first_ppo_kl(role_config(models / "qwen2-lm", "fp32", {}, aligned=False)) != 0.0


def _first_ppo_kl(config: TrainedRoleConfig) -> float:
    ids, lengths = pad_right([tokens.tolist() for tokens in sequences()])
    mask = (torch.arange(ids.shape[1] - 1)[None] < (lengths - 1)[:, None]) & (torch.arange(ids.shape[1] - 1)[None] >= 1)
    mask[0, 0] = True
    scorer = ModelEngine("actor", dataclasses.replace(config, micro_batch_size=8), "lm")
    output = log_probs_output(
        temperature=0.7, vocab_size=scorer.vocab_size, groups=scorer.groups, num_parts=scorer.vocab_parts
    )
    old = scorer.forward(ids, lengths, output).masked_fill(~mask, 0)
    actor = TrainEngine("actor", dataclasses.replace(config, packing=True), "lm", 1)
    inputs = PolicyInputs(old, old, torch.randn(mask.shape), mask)
    loss_fn = actor_loss_fn(AlgorithmConfig(), 0.7, actor.model.vocab_size, actor.groups, actor.model.vocab_parts)
    parts = actor.microbatches(ids, lengths, inputs, range(len(LENGTHS)))
    return step_metrics([actor.train_step([LossTerm(parts, loss_fn, int(mask.sum()))])])["actor/ppo_kl"]


def test_values_of_training_and_of_forwards_are_equal_bits(world: None, models: Path) -> None:
    ids, lengths = pad_right([tokens.tolist() for tokens in sequences()])
    config = role_config(models / "qwen3-score", "bf16", {}, aligned=True)
    found: list[Tensor] = []
    for size, packing in ((1, False), (8, True)):
        critic = ModelEngine("critic", dataclasses.replace(config, micro_batch_size=size, packing=packing), "value")
        found.append(critic.forward(ids, lengths, values_output))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found[0][row, : length - 1], found[1][row, : length - 1])


@pytest.mark.parametrize("head", ["score", "lm", "value"])
@pytest.mark.parametrize("packing", [False, True])
def test_an_aligned_role_passes_its_self_check_and_a_plain_one_does_not(
    world: None, models: Path, head: str, packing: bool
) -> None:
    folder = models / ("qwen2-lm" if head == "lm" else "qwen3-score")
    for aligned in (True, False):
        config = dataclasses.replace(role_config(folder, "fp32", {}, aligned), micro_batch_size=3, packing=packing)
        engine = ModelEngine("reward_model", config, head)
        if aligned:
            num_layers = 4
            assert f"{7 * (3 * num_layers + 1)} outputs of layers have the same bits" in check_alignment(engine)
        else:
            with pytest.raises(RunError, match="the first layer whose output differs is the (layer [01]|final norm)"):
                check_alignment(engine)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check is asked for, as on CUDA; of two sequences, for speed."""
    for module in (self_check, roles):
        monkeypatch.setattr(module, "platform", SimpleNamespace(HAS_CUDA=True))
    monkeypatch.setattr(self_check, "LENGTHS", (5, 65))


@pytest.fixture
def faulty_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of many rows are other ones: in their last bits, as those of a kernel are that cuts a sum by the number of rows."""
    product = products._rows_product

    def by_rows(rows: Tensor, weight: Tensor) -> Tensor:
        found = product(rows, weight)
        return found if len(rows) < 100 else found * (1 + 2**-7)

    monkeypatch.setattr(products, "_rows_product", by_rows)


def _run(aligned: dict[str, bool] | None = None) -> SimpleNamespace:
    """Make a run as ``build_role`` sees it, with the notes of the checkpoint that it resumes from."""
    resume = None if aligned is None else SimpleNamespace(aligned=aligned, folder=Path("checkpoint"))
    return SimpleNamespace(aligned={}, resume=resume)


def _build(run: SimpleNamespace, folder: Path, aligned: bool | None, device: SharedDevice | None = None) -> ModelEngine:
    config = dataclasses.replace(role_config(folder, "bf16", {}, aligned), micro_batch_size=3)
    return build_role(run, "reward", config, lambda role: TrainEngine("reward", role, "score", 1, device)).model


def test_by_default_a_role_is_aligned_where_it_proves_it(
    world: None, models: Path, on_cuda: None, logged: pytest.LogCaptureFixture
) -> None:
    for aligned, noted in ((None, {"reward": True}), (True, {})):
        run = _run()
        logged.clear()
        engine = _build(run, models / "qwen3-score", aligned)
        assert engine.bridge.aligned and engine.plain_because is None and run.aligned == noted
        assert any("have the same bits alone and among others" in line for line in logged.messages)


def test_by_default_a_role_that_fails_the_self_check_is_plain(
    world: None, models: Path, on_cuda: None, faulty_kernel: None, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """One loud line; what was built first leaves nothing on the device; there are no golden scores, and none are checked."""
    ids, lengths = pad_right([tokens.tolist() for tokens in sequences()])
    expected = ModelEngine(
        "plain",
        dataclasses.replace(role_config(models / "qwen3-score", "bf16", {}, False), micro_batch_size=3),
        "score",
    )
    with contextlib.closing(SharedDevice(ResidencyConfig(offload=True))) as device:
        run = _run()
        engine = _build(run, models / "qwen3-score", None, device)
        (line,) = [record.message for record in logged.records if record.levelno == logging.WARNING]
        assert re.match(
            r"reward: NOT ALIGNED\. .* the first layer whose output differs is the layer 0\. .*no golden scores", line
        )
        assert not engine.bridge.aligned and run.aligned == {"reward": False} and engine.config.aligned is False
        device.settle()
        assert device.roles == {"reward": engine.residency} and device.limit == engine.residency.num_bytes(FORWARD)
        with engine.on_device(phase="scores"):
            assert torch.equal(
                engine.forward(ids, lengths, scores_output), expected.forward(ids, lengths, scores_output)
            )
    guard, note = golden_guard(engine, 1)
    assert (
        guard is None and "golden scores are not checked, reward.aligned is null, and it failed the self-check" in note
    )
    trainer = SimpleNamespace(engine=SimpleNamespace(model=engine))
    assert RewardModelTrainer.weight_files(trainer) == {}
    with pytest.raises(RunError, match="reward.aligned: the bits of .* set reward.aligned to false"):
        _build(_run(), models / "qwen3-score", True)


def test_a_run_that_goes_on_computes_its_roles_as_before(
    world: None,
    models: Path,
    on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    logged: pytest.LogCaptureFixture,
) -> None:
    was_plain = _run({"reward": False})
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "find_difference", lambda engine: pytest.fail("a plain role proves nothing"))
        engine = _build(was_plain, models / "qwen3-score", None)
    assert not engine.bridge.aligned and was_plain.aligned == {"reward": False}
    assert any(line.startswith("reward: plain, as in the run of checkpoint") for line in logged.messages)
    assert "it was plain in the run that the checkpoint is of" in golden_guard(engine, 1)[1]
    for noted, line in (
        ({"reward": True}, None),
        ({}, "reward: aligned from here on; checkpoint does not say whether it was"),
    ):
        run = _run(noted)
        logged.clear()
        assert _build(run, models / "qwen3-score", None).bridge.aligned
        assert [text for text in logged.messages if "checkpoint" in text] == ([] if line is None else [line])
    request.getfixturevalue("faulty_kernel")
    was_aligned = _run({"reward": True})
    assert not _build(was_aligned, models / "qwen3-score", None).bridge.aligned
    warnings = [record.message for record in logged.records if record.levelno == logging.WARNING]
    assert any(line.startswith("reward was aligned in the run of checkpoint and is not any more") for line in warnings)


def test_the_commands_fall_back_too_but_for_verify(
    models: Path,
    tmp_path: Path,
    on_cuda: None,
    faulty_kernel: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(models / "qwen3-score", folder)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"token_ids": [5, 6]}) + "\n")
    options = ["--checkpoint", str(folder), "--dtype", "bf16"]
    assert main(["score", *options, "--data", str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "warning: reward_model: NOT ALIGNED" in capsys.readouterr().out
    pair = {
        "pair": 0,
        "chosen_ids": [5],
        "rejected_ids": [6],
        "chosen_score": "0x0p+0",
        "rejected_score": "0x0p+0",
        "layers": [],
    }
    (folder / GOLDEN_FILE).write_text("\n".join(map(json.dumps, [{"record": {"dtype": "bf16"}}, pair])))
    assert main(["verify", "rm", *options]) == 1
    assert "reward_model.aligned: the bits of a sequence of" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["score", "lm"])
def test_an_aligned_role_passes_its_self_check_on_cuda(world: None, models: Path, head: str) -> None:
    folder = models / f"qwen3-{head}"
    engine = ModelEngine("reward_model", role_config(folder, "bf16", {}, aligned=True), head)
    check_alignment(engine)


def _examples() -> list[PreferenceExample]:
    rows = [tokens.tolist() for tokens in sequences()]
    return [PreferenceExample(chosen, rejected, 0) for chosen, rejected in zip(rows, reversed(rows))]


def _with_golden(models: Path, folder: Path, dtype: str = "bf16") -> Path:
    """Copy the reward model and add golden scores. Return the copy's folder."""
    shutil.copytree(models / "qwen3-score", folder)
    engine = ModelEngine("reward", role_config(folder, dtype, {}, aligned=True), "score")
    (folder / GOLDEN_FILE).write_text(make_golden(engine, _examples()).text())
    return folder


def _guard(
    folder: Path, dtype: str = "bf16", aligned: bool | None = True
) -> tuple[GoldenGuard | None, str, ModelEngine]:
    config = dataclasses.replace(role_config(folder, dtype, {}, aligned), micro_batch_size=5, packing=True)
    engine = ModelEngine("reward_model", config, "score")
    guard, note = golden_guard(engine, every=2)
    return guard, note, engine


def test_golden_scores_are_repeated_or_the_run_stops(world: None, models: Path, tmp_path: Path) -> None:
    folder = _with_golden(models, tmp_path / "rm")
    golden = read_golden(folder / GOLDEN_FILE)
    assert [len(pair.layers) for pair in golden.pairs] == [4, 4, 4, 4, 0, 0, 0, 0]  # embedding, two layers, norm
    guard, note, engine = _guard(folder)
    assert guard is not None and "8 golden pairs" in note
    guard.check(0, first=True)
    with torch.no_grad():
        engine.models[0].decoder.layers[1].mlp.linear_fc2.weight[3, 5] += 0.5
    guard.check(1)  # it is not time
    stored = golden.pairs[0].chosen_score
    with pytest.raises(
        RunError, match=rf"{GOLDEN_FILE}, pair 0: the chosen score is {stored} .* is the layer 1 \(pair 0\)"
    ):
        guard.check(2)


def test_golden_scores_that_promise_nothing_are_said(world: None, models: Path, tmp_path: Path) -> None:
    folder = _with_golden(models, tmp_path / "rm")
    guard, note, engine = _guard(folder, "fp32", aligned=None)  # aligned by default, and nothing was asked for
    assert guard is None and engine.bridge.aligned and "made elsewhere (dtype: bf16 there, fp32 here)" in note
    assert "reward_model.aligned is false" in _guard(folder, aligned=False)[1]
    with pytest.raises(ValueError, match="reward_model.model.dtype is fp32, but .* were made in bf16"):
        _guard(folder, "fp32")
    lines = (folder / GOLDEN_FILE).read_text().splitlines()
    record = json.loads(lines[0])
    for field, value, shown in (
        ("cpu", "abacus", "cpu: abacus there"),
        ("cpu_flags", ["avx2", "amx_bf16"], "cpu_flags: avx2 amx_bf16 there, "),
        ("kernel_limits", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "kernel_limits: ONEDNN_MAX_CPU_ISA=AVX2 there, none here"),
    ):
        changed = {"record": {**record["record"], field: value}}
        (folder / GOLDEN_FILE).write_text("\n".join([json.dumps(changed), *lines[1:]]))
        guard, note, _ = _guard(folder)
        assert guard is None and shown in note
    older = {name: value for name, value in record["record"].items() if name not in ("cpu_flags", "kernel_limits")}
    (folder / GOLDEN_FILE).write_text("\n".join([json.dumps({"record": older}), *lines[1:]]))
    assert _guard(folder)[0] is not None
    (folder / GOLDEN_FILE).write_text("\n".join([*lines[:3], "{}"]))
    with pytest.raises(ValueError, match="golden_scores.jsonl, line 4: not a line of golden scores"):
        _guard(folder)
    (folder / GOLDEN_FILE).unlink()
    assert "does not exist" in _guard(folder)[1]


def test_commands(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _one_rank(monkeypatch)
    initialise(2.0)
    folder = _with_golden(models, tmp_path / "rm", "fp32")
    finish()
    assert main(["verify", "rm", "--checkpoint", str(folder)]) == 0
    assert "16 scores of 8 pairs have the same bits, and so have all 4 layers of 4 of them" in capsys.readouterr().out
    data, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps({"token_ids": example.chosen_ids}) + "\n" for example in _examples()))
    assert main(["score", "--checkpoint", str(folder), "--data", str(data), "--out", str(out)]) == 0
    scores = [json.loads(line)["score_hex"] for line in out.read_text().splitlines()]
    assert scores == [pair.chosen_score for pair in read_golden(folder / GOLDEN_FILE).pairs]
    data.write_text(json.dumps({"token_ids": [5, 131]}))
    assert main(["score", "--checkpoint", str(folder), "--data", str(data), "--out", str(out)]) == 2
    assert "line 1, field 'token_ids': has to be a list of token ids below 131" in capsys.readouterr().err

    # Another limit of oneDNN, where other bits are no fault of the model's.
    lines = (folder / GOLDEN_FILE).read_text().splitlines()
    pair = json.loads(lines[1]) | {"chosen_score": (0.125).hex()}
    (folder / GOLDEN_FILE).write_text("\n".join([lines[0], json.dumps(pair), *lines[2:]]))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert main(["verify", "rm", "--checkpoint", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "made elsewhere, so bits may differ: kernel_limits: none there, ONEDNN_MAX_CPU_ISA=AVX2 here" in captured.out
    assert "pair 0: the chosen score is 0x1" in captured.err and "That says nothing against the model" in captured.err


def test_scores_that_are_not_finite_are_errors(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(models / "qwen3-score", folder)
    weights = load_file(folder / "model.safetensors")
    # A token that no other row has.
    weights["model.embed_tokens.weight"][7] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in ([5, 6], [8, 7, 9], [7])))
    assert main(["score", "--checkpoint", str(folder), "--data", str(data), "--out", str(out)]) == 1
    assert f"{data}, row 1, counted from 0: the score is nan (2 of 3 scores are not finite)" in capsys.readouterr().err
    assert not out.exists()
    pairs = [PreferenceExample([5, 6], [5, 8], 1), PreferenceExample([5, 9], [5, 7], 1)]
    report = SimpleNamespace(describe=lambda: "")
    monkeypatch.setattr(reward_commands, "load_text_encoder", lambda *arguments: None)
    monkeypatch.setattr(
        reward_commands, "load_preferences", lambda *arguments: SimpleNamespace(examples=pairs, report=report)
    )
    assert main(["eval", "rm", "--checkpoint", str(folder), "--data", str(data)]) == 1
    assert (
        f"{data}, pair 1, rejected answer, counted from 0: the score is nan (1 of 2 scores are not finite)"
        in capsys.readouterr().err
    )
