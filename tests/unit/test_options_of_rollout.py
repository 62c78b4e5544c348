"""Each option of ``rollout`` reaches the place where it acts: a server's requests and deadlines, and what a PPO run builds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.generator_requests import ask

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig, WeightTransfer
from hetero_ppo.inference.decoder import Decoder
from hetero_ppo.rollout import vllm as vllm_module
from hetero_ppo.rollout.vllm import ServersState, VllmGenerator
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.rollout.servers import pool as pool_module
from hetero_ppo.rollout.servers.client import ServerClient
from hetero_ppo.rollout.servers.pool import ServerPool
from hetero_ppo.rollout.weights.transports import SharedMemory

SAMPLING = SamplingConfig(
    temperature=0.7, top_p=0.8, top_k=9, max_tokens=5, stop_token_ids=[7], stop=["\n"], ignore_eos=False
)


def make_generator(tokenizer_path: str | None = None, **config: Any) -> VllmGenerator:
    return VllmGenerator(
        RolloutConfig(**config),
        model_path="model",
        dtype=Dtype.fp32,
        run_dir=Path("run"),
        max_model_len=64,
        eos_token_ids=[1, 2],
        tokenizer_path=tokenizer_path,
    )


def test_all_of_the_sampling_is_sent() -> None:
    sent: dict[str, Any] = {}

    async def post(phase: str, route: str, timeout_s: float, body: dict[str, Any]) -> dict[str, Any]:
        sent.update(body, timeout_s=timeout_s)
        return {"choices": [None]}

    client = ServerClient.__new__(ServerClient)
    client.post = post  # type: ignore[method-assign]
    client._response = lambda choice: choice  # type: ignore[method-assign,assignment,return-value]
    asyncio.run(client.generate([3, 4], SAMPLING, 5, [7, 1], 11, 6.0, "0-0-0"))
    assert (sent["token_ids"], sent["request_id"], sent["timeout_s"]) == ([3, 4], "0-0-0", 6.0)
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "max_tokens": 5, "stop_token_ids": [7, 1], "seed": 11}
    assert {name: sent["sampling_params"][name] for name in expected} == expected
    assert sent["sampling_params"]["stop"] == ["\n"] and sent["sampling_params"]["detokenize"] is True


@pytest.mark.parametrize(("ignore_eos", "stop"), [(False, [7, 1, 2]), (True, [7])])
def test_what_ends_a_response_and_how_long_it_may_take(
    ignore_eos: bool, stop: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(vllm_module, "Requests", lambda *args: (asked.append(args), SimpleNamespace(run=list))[1])
    generator = make_generator(tokenizer_path="tokenizer", request_timeout_s=3.0)
    generator._state = ServersState.awake
    generator._pool = SimpleNamespace(version="v", on_stalled=None)  # type: ignore[assignment]
    generator._run = lambda result: result  # type: ignore[method-assign,assignment]
    sampling = SamplingConfig(max_tokens=5, stop_token_ids=[7], ignore_eos=ignore_eos)
    assert ask(generator, [[3], [4, 5]], sampling, n=1, seed=0) == []
    ((_, request, found, timeout_s, _),) = asked
    assert ([request.limit_of(0), request.limit_of(1)], found, timeout_s) == ([5, 5], stop, 3.0)


def test_servers_have_the_dtype_of_the_engine_where_it_is_set() -> None:
    assert [make_generator(dtype=dtype)._spec.dtype for dtype in (None, Dtype.bf16)] == [Dtype.fp32, Dtype.bf16]
    asked = WeightTransfer.collective
    assert (
        make_generator(weight_transfer=asked)._transfer is asked
        and make_generator()._transfer is WeightTransfer.shared_memory
    )


class RecordingClient:
    """Stands for a server's client: notes the deadlines that it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    async def open(self) -> None: ...

    async def wait_ready(self, timeout_s: float) -> None:
        self.calls.append(("start", timeout_s))

    async def post(self, phase: str, route: str, timeout_s: float, body: Any = None) -> None:
        self.calls.append((route, timeout_s))


@pytest.mark.parametrize("verify", [False, True])
def test_deadlines_of_servers_and_checks_of_their_weights(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    client, found = RecordingClient(), []
    monkeypatch.setattr(
        pool_module, "ServerClient", lambda server, hang_timeout_s, on_death: (found.append(hang_timeout_s), client)[1]
    )

    async def stage(client: Any, files: Any, timeout_s: float, **_: Any) -> float:
        return found.append(("stage", timeout_s)) or 0.0

    async def swap(client: Any, files: Any, timeout_s: float, *, verify: bool) -> float:
        return found.append(("swap", timeout_s, verify)) or 0.0

    monkeypatch.setattr(pool_module, "stage", stage)
    monkeypatch.setattr(pool_module, "swap", swap)
    config = RolloutConfig(
        start_timeout_s=3.0, sync_timeout_s=4.0, hang_timeout_s=5.0, max_restarts=7, max_num_seqs=6, verify_sync=verify
    )

    async def run() -> None:
        server = SimpleNamespace(spawn=lambda: None)
        pool = ServerPool([server, server], config, "v", SharedMemory())  # type: ignore[list-item]
        assert pool.max_restarts == 7 and pool._slots._value == 2 * 6 * 2
        await pool._boot(pool.members[0], "start")
        pool.weights = SimpleNamespace(version="w", checksums={})  # type: ignore[assignment]
        await pool._boot(pool.members[1], "restart")

    asyncio.run(run())
    assert client.calls == [("start", 3.0), ("/update_weight_version", 4.0), ("start", 3.0)]
    assert found == [5.0, 5.0, ("stage", 4.0), ("swap", 4.0, verify)]


@pytest.mark.parametrize(
    ("sampling", "ends"),
    [
        ({}, [False, True, False]),
        ({"ignore_eos": True}, [False, False, False]),
        ({"stop_token_ids": [3]}, [False, True, True]),
        ({"stop": ["cb"]}, [False, True, False]),
        ({"stop": ["ca"]}, [False, True, True]),
    ],
)
def test_what_ends_a_response_of_the_actor(sampling: dict[str, Any], ends: list[bool]) -> None:
    """9 is the end of a sequence, and tokens are letters: "dab", "ab" and the end, "cac"."""
    generator = MegatronGenerator.__new__(MegatronGenerator)
    generator.eos_token_ids = [9]
    generator._decode = lambda token_ids: "".join("?abcdefghi"[token] for token in token_ids)
    is_last = generator._end_of(SamplingConfig(**sampling))
    assert [is_last(token_ids) for token_ids in ([4, 1, 2], [1, 2, 9], [3, 1, 3])] == ends


@pytest.mark.parametrize(
    ("sampling", "token"),
    [({}, 2), ({"top_k": 2}, 1), ({"top_p": 0.4}, 0), ({"temperature": 0.5}, 1), ({"temperature": 0.0}, 0)],
)
def test_how_the_actor_samples(sampling: dict[str, Any], token: int) -> None:
    """Of probabilities 0.5, 0.3, 0.2 the random number 0.89 takes the last; of two of them 0.625, 0.375; of their squares' 0.66, 0.24, 0.11."""
    decoder = Decoder.__new__(Decoder)
    one = SimpleNamespace(size=lambda: 1)
    decoder.engine = SimpleNamespace(groups=SimpleNamespace(tp=one), role="actor")  # type: ignore[assignment]
    live: Any = [SimpleNamespace(uniforms=[0.89], token_ids=[])]
    tokens, _ = decoder._sample(torch.tensor([[0.5, 0.3, 0.2]]).log(), live, SamplingConfig(**sampling))
    assert tokens == [token]
