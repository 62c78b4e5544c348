"""The generator on a real vLLM server. One server serves all tests, in this order; the last one kills it. Restarts: test_failures.py."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.chain import ROOT
from tests.helpers.processes import LOOPBACK_ADDRESSES, listening_addresses
from tests.helpers.generator_contract import (
    EOS,
    FREE,
    MAX_MODEL_LEN,
    PROMPTS,
    VOCAB,
    SamplingContract,
    make_model,
    model_log_probs,
    save_model,
    tokens,
    weights,
    worst_difference,
)
from tests.helpers.generator_requests import ask, prompts_of
from torch import Tensor

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig, WeightTransfer
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.rollout.sweep import find_running_batch
from hetero_ppo.rollout.weights.transports import weight_transport
from hetero_ppo.rollout.weights.weight_sync import stage, swap
from hetero_ppo.rollout.weights.weight_version import WeightVersion, take_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def doomed_trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A trainer process with its own generator, which a test kills; see tied_trainer.py."""
    folder = tmp_path_factory.mktemp("doomed")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.tied_trainer", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def generator(
    model_path: Path, doomed_trainer: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmGenerator]:
    config = RolloutConfig(kv_cache_mib=64, max_num_seqs=32, max_restarts=0, hang_timeout_s=10.0, sleep=True)
    with VllmGenerator(
        config,
        model_path=str(model_path),
        dtype=Dtype.fp32,
        run_dir=tmp_path_factory.mktemp("run"),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        tokenizer_path=str(model_path),
    ) as running:
        yield running


def children(pid: int) -> list[int]:
    """Return all descendants that /proc shows."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split() if int(child) not in found]
    return found + [grandchild for child in found for grandchild in children(child)]


def engine_cores(pids: list[int]) -> list[int]:
    return [pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def wait_until_gone(pids: list[int], timeout_s: float) -> list[int]:
    """Wait for the processes to end. Return those that still live after the timeout."""
    deadline = time.monotonic() + timeout_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive(pids)


class TestContract(SamplingContract):
    """The contract of every generator."""


def test_the_server_answers_its_owner_alone(generator: VllmGenerator) -> None:
    server = generator.servers[0]
    assert stat.S_IMODE(server.private_dir.stat().st_mode) == 0o700
    assert server.api_key.encode() not in Path(f"/proc/{server.process_group}/cmdline").read_bytes()
    connection = http.client.HTTPConnection("server", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(server.endpoint.socket_path))
    for route in ("/inference/v1/generate", "/collective_rpc", "/pause"):  # vLLM's own check leaves out the last two
        connection.request("POST", route, "{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (401, b"")
    owner = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    stage = {"method": "hetero_ppo_stage_weights", "kwargs": {"paths": ["/etc/passwd"]}}
    for route, body, status in (
        ("/collective_rpc", {"method": "save_sharded_state", "kwargs": {"path": "/tmp/x"}}, 403),
        ("/collective_rpc", stage, 403),
        ("/collective_rpc", {"method": "hetero_ppo_device"}, 200),
        ("/v1/completions", {"prompt": "a"}, 404),
    ):
        connection.request("POST", route, json.dumps(body), owner)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, status == 200)
    connection.close()


def test_no_other_machine_reaches_the_server(generator: VllmGenerator) -> None:
    server = generator.servers[0]
    assert listening_addresses([server.process_group, *children(server.process_group)]) <= LOOPBACK_ADDRESSES


@pytest.mark.skipif(
    os.geteuid() != 0, reason="acting as another user takes root; the folder's mode is tested for everybody"
)
def test_no_other_user_reaches_the_server(generator: VllmGenerator) -> None:
    """The sockets' folder is closed to others, development routes included."""
    server = generator.servers[0]
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for user, error in ((65534, "PermissionError"), (0, "")):
        command = ["python3", "-I", "-c", connect, str(server.endpoint.socket_path)]
        done = subprocess.run(command, user=user, cwd="/", capture_output=True, text=True, check=False)
        assert (error in done.stderr) and (done.returncode == 0) == (error == "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "missing tensor 'model.norm.weight'"),
        ({"model.norm.weigth": torch.zeros(256)}, "unknown tensor 'model.norm.weigth'"),
        (
            {"lm_head.weight": torch.zeros(256, VOCAB)},
            r"'lm_head.weight' has shape \[256, 128\], expected \[128, 256\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_leave_the_old_weights_serving(
    generator: VllmGenerator, change: dict[str, Tensor | None], message: str
) -> None:
    before = ask(generator, PROMPTS, FREE, n=1, seed=8)
    changed = {name: tensor for name, tensor in (dict(weights(make_model(1))) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"weight sync 'bad'.*{message}"):
        generator.sync_weights(iter(changed.items()), "bad")
    after = ask(generator, PROMPTS, FREE, n=1, seed=8)
    assert tokens(after) == tokens(before) and after[0][0].weight_version == "initial"
    assert generator.version == "initial"


def test_new_weights_serve_after_a_sync(generator: VllmGenerator) -> None:
    long_prompt = [[2 + i % 100 for i in range(200)]]  # long enough for the prefix cache to hold blocks of it
    ask(generator, long_prompt, FREE, n=1, seed=2)
    old, new = make_model(0), make_model(1)
    generator.sync_weights(weights(new), "step_1")
    answers = ask(generator, PROMPTS + long_prompt, FREE, n=1, seed=2)
    assert {group[0].weight_version for group in answers} == {"step_1"} and generator.version == "step_1"
    assert worst_difference(new, PROMPTS + long_prompt, answers) < 1e-4
    assert worst_difference(old, PROMPTS + long_prompt, answers) > 0.5
    assert generator.verify_sync(PROMPTS[-1], model_log_probs(new, PROMPTS[-1]).tolist()) < 1e-4
    files = generator._started_pool().weights.paths
    generator.sync_weights(weights(new), "step_2")
    assert not files[0].exists() and generator._started_pool().weights.paths[0].exists()


#: One tensor of each kind that the generator holds in its own way: fused, packed, padded, plain.
CORRUPTED = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight",
    "model.layers.3.mlp.up_proj.weight",
)


def flip_bits(files: WeightVersion, names: tuple[str, ...]) -> None:
    """Flip one bit of one element of each tensor in the file."""
    (path,) = files.paths
    with open(path, "r+b") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        for name in names:
            position = 8 + header_bytes + header[name]["data_offsets"][0] + 40
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1]))


def use_transfer(generator: VllmGenerator, kind: WeightTransfer) -> None:
    """Switch the running server to another transport of weights."""
    generator._started_pool().transport = weight_transport(kind, generator.config, torch.device("cpu"))


def on_loop(generator: VllmGenerator, call: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as the generator does, but without ending the generator on an error."""
    return asyncio.run_coroutine_threadsafe(call, generator._loop).result()


def test_corrupted_tensors_are_named_whether_they_arrived_so_or_were_loaded_so(generator: VllmGenerator) -> None:
    client = generator._started_pool().members[0].client
    folder = generator.servers[0].private_dir  # servers read files of the run alone
    files = take_weights(folder / "a", weights(make_model(5)), "bits lost on the way", Dtype.fp32)
    flip_bits(files, CORRUPTED)
    with pytest.raises(RunError, match="'bits lost on the way'.* read other bytes than were written for") as caught:
        on_loop(generator, stage(client, files, 60.0))
    assert str(list(CORRUPTED)) in str(caught.value)
    use_transfer(generator, WeightTransfer.collective)
    with pytest.raises(RunError, match="'bits lost on the way'.* read other bytes than were written for") as caught:
        on_loop(generator, generator._started_pool().load(files))
    assert str(list(CORRUPTED)) in str(caught.value)
    use_transfer(generator, WeightTransfer.shared_memory)

    files = take_weights(folder / "b", weights(make_model(5)), "bits lost in loading", Dtype.fp32)
    on_loop(generator, stage(client, files, 60.0))
    flip_bits(files, CORRUPTED)  # the staged tensors are a view of the file
    with pytest.raises(RunError, match="'bits lost in loading'.* hold other bytes than were sent for") as caught:
        on_loop(generator, swap(client, files, 60.0, verify=True))
    assert f"{list(CORRUPTED)}, {len(CORRUPTED)} in all" in str(caught.value)

    generator.sync_weights(weights(make_model(1)), "step_2")  # as it was before
    assert generator.verify_sync(PROMPTS[0], model_log_probs(make_model(1), PROMPTS[0]).tolist()) < 1e-4
    num_bytes = 4 * sum(parameter.numel() for parameter in make_model(1).parameters())
    sync = generator.last_sync
    assert sync is not None and sync.num_bytes == num_bytes
    assert sync.seconds > sync.write_s + sync.checksum_s and min(sync.write_s, sync.checksum_s, sync.probe_s) > 0
    assert sync.metrics()["rollout/sync_gb_s"] == pytest.approx(num_bytes / sync.seconds / 1e9)


@pytest.mark.parametrize("transfer", [WeightTransfer.shared_memory, WeightTransfer.collective])
def test_a_sleeping_engine_takes_weights_and_wakes_with_them(
    generator: VllmGenerator, transfer: WeightTransfer
) -> None:
    """Weights come before the KV cache; what needs the cache is refused until it is back."""
    use_transfer(generator, transfer)  # the tests after this one go on with the second
    generator.sleep()
    with pytest.raises(RuntimeError, match="weight sync: the generator is asleep"):
        generator.sync_weights(iter(()), "none")
    generator.wake(weights_only=True)
    model = make_model(7)
    generator.sync_weights(weights(model), "after sleep")
    for needs_cache in (
        lambda: ask(generator, PROMPTS[:1], FREE, n=1, seed=0),
        lambda: generator.verify_sync(PROMPTS[0], []),
    ):
        with pytest.raises(RuntimeError, match="is without its KV cache; wake it"):
            needs_cache()
    generator.wake()
    generator.sleep()  # and again without a sync in between: the files of the last one bring the weights back
    assert generator._weights_dropped
    generator.wake()
    assert generator.verify_sync(PROMPTS[0], model_log_probs(model, PROMPTS[0]).tolist()) < 1e-3
    assert worst_difference(model, PROMPTS[:2], ask(generator, PROMPTS[:2], FREE, n=1, seed=0)) < 1e-3
    generator.sync_weights(weights(make_model(1)), "step_2")  # as it was before


def test_unfinished_responses_are_aborted_and_resumed_under_new_weights(generator: VllmGenerator) -> None:
    """step_2 makes the first part, other weights the rest; every part has the log-probs of the weights that made it."""
    generator.sync_weights(weights(make_model(1)), "step_2")
    limits = [8] * 6 + [200] * 6
    sampling = SamplingConfig(max_tokens=200, ignore_eos=True)
    whole = ask(generator, PROMPTS, sampling, n=1, seed=9, max_tokens=limits)
    reported: list[int] = []
    answers = ask(
        generator,
        PROMPTS,
        sampling,
        n=1,
        seed=9,
        max_tokens=limits,
        num_needed=6,
        on_response=lambda prompt, *_: reported.append(prompt),
    )
    first = [group[0] for group in answers]
    assert sorted(reported) == list(range(6)) and {r.finish_reason for r in first[:6]} == {"length"}
    assert {r.finish_reason for r in first[6:]} == {"abort"}
    for part, (response,) in zip(first, whole, strict=True):
        assert part.token_ids == response.token_ids[: len(part.token_ids)] and len(part.log_probs) == len(
            part.token_ids
        )
    partial = [response if response.token_ids else None for response in first[6:]]
    assert any(partial), "some responses had tokens when they were aborted"

    new = make_model(5)
    generator.sync_weights(weights(new), "step_3")
    resumed = ask(generator, PROMPTS[6:], sampling, n=1, seed=10, partial=partial, num_needed=6)
    for prompt, part, (response,) in zip(PROMPTS[6:], partial, resumed, strict=True):
        made = 0 if part is None else len(part.token_ids)
        assert len(response.token_ids) == 200 and response.weight_version == "step_3"
        assert response.earlier == ((("step_2", made),) if made else ())
        assert response.token_ids[:made] == (part.token_ids if part else [])
        assert response.log_probs[:made] == (part.log_probs if part else [])
        ours = model_log_probs(new, prompt + response.token_ids)[len(prompt) - 1 :]
        assert (ours - torch.tensor(response.log_probs))[made:].abs().max() < 1e-4
        assert made == 0 or (ours - torch.tensor(response.log_probs))[:made].abs().max() > 0.5
    complete = ask(generator, PROMPTS[6:], sampling, n=1, seed=11, partial=[group[0] for group in resumed])
    assert complete == resumed, "what is complete already is not asked for again"
    generator.sync_weights(weights(make_model(1)), "step_2")  # as it was before


@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
def test_beam_search_finds_what_transformers_finds(generator: VllmGenerator, length_penalty: float) -> None:
    """early_stopping="never" is transformers' bound that loses nothing; ours is the same or tighter."""
    model = make_model(1)
    generator.sync_weights(weights(model), "step_2")
    arguments = {"num_beams": 4, "length_penalty": length_penalty}
    found = generator.beam_search(PROMPTS[:3], max_tokens=12, num_return=2, **arguments)
    for prompt, hypotheses in zip(PROMPTS, found, strict=False):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            num_return_sequences=2,
            early_stopping="never",
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        for hypothesis, sequence, score in zip(hypotheses, theirs.sequences, theirs.sequences_scores, strict=True):
            response = sequence[len(prompt) :].tolist()
            length = response.index(EOS) + 1 if EOS in response else len(response)
            assert hypothesis.token_ids == response[:length]
            assert hypothesis.score == pytest.approx(score.item(), rel=1e-5)
            assert hypothesis.finish_reason == ("stop" if EOS in response else "length")
            assert hypothesis.log_prob == pytest.approx(
                model_log_probs(model, prompt + hypothesis.token_ids)[len(prompt) - 1 :].sum().item(), abs=1e-3
            )


def test_the_sweep_measures_the_engine(generator: VllmGenerator) -> None:
    result = find_running_batch(generator, prompts_of(PROMPTS), SamplingConfig(max_tokens=8), largest=16, budget_s=20.0)
    assert list(result.tokens_per_s) == [8, 16] and result.batch in (8, 16)
    assert all(rate > 10 for rate in result.tokens_per_s.values())


def test_a_cpu_server_takes_long_prompts_and_syncs_both_uses_of_a_tied_matrix(
    doomed_trainer: subprocess.Popen[str],
) -> None:
    """vLLM on a CPU differs from vLLM on a GPU in this: packed weights of a tied matrix, and random generators of a request."""
    assert doomed_trainer.stdout is not None
    found = json.loads(doomed_trainer.stdout.readline())
    assert found["lengths"] == [2] * 96, "vLLM must not split a prompt: it would wind a request's generator back"
    for before_or_after in ("before", "after"):
        theirs, ours = found[before_or_after]
        assert theirs == pytest.approx(ours, abs=1e-4)
    assert found["before"][1] != pytest.approx(found["after"][1], abs=0.1)


def test_a_killed_trainer_leaves_no_server(doomed_trainer: subprocess.Popen[str]) -> None:
    family = children(doomed_trainer.pid)
    assert engine_cores(family)
    doomed_trainer.kill()
    doomed_trainer.wait()
    assert len(family) >= 3 and wait_until_gone(family, 5.0) == []


def test_a_server_that_hangs_is_as_one_that_died_and_too_many_end_the_run(generator: VllmGenerator) -> None:
    """The engine core is stopped: ``/health`` answers as ever."""
    group = generator.servers[0].process_group
    family = [group, *children(group)]
    private = generator.servers[0].private_dir
    core = engine_cores(family)[0]
    threading.Timer(0.5, os.kill, (core, signal.SIGSTOP)).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        ask(generator, PROMPTS, SamplingConfig(max_tokens=200, ignore_eos=True), n=8, seed=4)
    assert time.monotonic() - start < 60
    text = str(caught.value)
    assert re.match(
        r"generate: rollout server 0 \(unix:.*\) hangs \(no answer for 1\d s; rollout.hang_timeout_s=10\)", text
    )
    assert re.search(
        rf"still running \(process {core} is T \(stopped\)\); log: .*server_0\.log; its last lines:\n", text
    )
    assert "rollout.max_restarts allows 0" in text
    assert alive(family) == [] and not private.exists()
    with pytest.raises(RuntimeError, match="not running"):
        ask(generator, PROMPTS, FREE, n=1, seed=0)
