"""Every kind of command line and environment that a server on GPUs gets, read by vLLM's own parser: nothing here needs a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.rollout.servers.server import MAX_LOG_PROBS, VLLM_DTYPE, Endpoint, ServerSpec, command_line, environment

ENDPOINTS = {
    "socket": Endpoint(socket_path=Path("/run/0.sock")),
    "port": Endpoint(address="10.0.0.1:8001", listen_fd=7),
}
#: Reads command lines as the server's program does, up to where it would look for a device.
PARSE = """
import json, sys
import vllm.envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

request = json.load(sys.stdin)
parsed = []
for line in request["lines"]:
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    validate_parsed_serve_args(arguments)
    engine = AsyncEngineArgs.from_cli_args(arguments)
    found = {name: getattr(arguments, name, None) for name in request["server"]}
    parsed.append(found | {name: getattr(engine, name) for name in request["engine"]})
unknown = sorted(set(request["variables"]) - vllm.envs.environment_variables.keys())
json.dump({"parsed": parsed, "unknown": unknown}, sys.stdout, default=str)
"""


def cases(model: Path) -> Iterator[tuple[str, ServerSpec, bool]]:
    """Name of the endpoint, servers, and whether they can sleep."""
    for endpoint, tp, sleep, load in itertools.product(ENDPOINTS, (1, 8), (None, False), (True, False)):
        for dtype, tokenizer in zip(Dtype, itertools.cycle((None, str(model)))):
            config = RolloutConfig(tensor_parallel=tp, sleep=sleep, gpu_memory_utilization=0.35, max_num_seqs=48)
            spec = ServerSpec(str(model), dtype, 4096, load, True, config, threads=1, tokenizer_path=tokenizer)
            yield endpoint, spec, sleep is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model: offline vLLM's arguments take only one that is there."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def read(model: Path) -> dict[str, Any]:
    """Return what vLLM reads from all of them, by one process, since its imports take seconds."""
    lines, variables = [], set[str]()
    for name, spec, _ in cases(model):
        command = command_line(spec, ENDPOINTS[name])
        assert command[:2] == [sys.executable, "-m"]
        lines.append(command[2 + len(ENDPOINTS[name].program()) :])
        given = environment(spec, 0, Path("/private"), "key", {})
        variables |= {variable for variable in given if variable.startswith("VLLM_")}
    server = ["host", "port", "uds", "middleware", "disable_uvicorn_access_log", "api_key"]
    engine = [
        "model",
        "served_model_name",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "tensor_parallel_size",
        "enforce_eager",
    ]
    engine += ["gpu_memory_utilization", "enable_sleep_mode", "load_format", "generation_config", "logprobs_mode"]
    engine += ["worker_extension_cls", "skip_tokenizer_init", "tokenizer", "kv_cache_memory_bytes", "max_logprobs"]
    request = {"lines": lines, "server": server, "engine": engine, "variables": sorted(variables)}
    environ = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps(request), env=environ, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index('{"parsed"') :])


def test_vllm_reads_what_was_meant(read: dict[str, Any], model: Path) -> None:
    assert len(read["parsed"]) == len(list(cases(model))) >= 32
    for (name, spec, can_sleep), found in zip(cases(model), read["parsed"], strict=True):
        endpoint = ENDPOINTS[name]
        if endpoint.socket_path is not None:
            assert found["uds"] == str(endpoint.socket_path)
        else:
            assert (found["host"], found["port"], found["uds"]) == ("10.0.0.1", 8001, None)
        assert found["middleware"] == ["hetero_ppo.rollout.servers.server_token.RequireToken"]
        assert found["model"] == spec.model_path and found["dtype"] == VLLM_DTYPE[spec.dtype]
        assert (found["max_model_len"], found["max_num_seqs"], found["max_logprobs"]) == (4096, 48, MAX_LOG_PROBS)
        assert found["tensor_parallel_size"] == spec.config.tensor_parallel
        assert found["gpu_memory_utilization"] == 0.35 and found["kv_cache_memory_bytes"] is None
        assert found["enable_sleep_mode"] is can_sleep and found["enforce_eager"] is False
        assert found["load_format"] == ("safetensors" if spec.load_weights else "dummy")
        assert (found["generation_config"], found["logprobs_mode"]) == ("vllm", "processed_logprobs")
        assert found["worker_extension_cls"] == "hetero_ppo.rollout.weights.worker_extension.WeightReceiver"
        assert found["skip_tokenizer_init"] is (spec.tokenizer_path is None)
        assert found["tokenizer"] == spec.tokenizer_path
        assert found["api_key"] is None  # a variable has it: command lines are public


def test_vllm_knows_every_variable_that_a_server_gets(read: dict[str, Any]) -> None:
    assert read["unknown"] == []
