"""The console script: what it prints, its exit status, and one line for what a user got wrong."""

from __future__ import annotations

import json
import re
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.data_fixtures import chatml_tokenizer, write_jsonl, write_llama
from tests.helpers.critic_free import registered

from hetero_ppo.cli import config as config_command
from hetero_ppo.cli.main import build_parser, main
from hetero_ppo.trainers.export import single_process

#: The keys of a config.json that the checks and the memory plan read.
MODEL_CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: Overrides of a run without a reward model.
BY_FUNCTION = ["reward_model=null", "reward.source=function"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a language model and a reward model whose weights are zeros, and one config per kind."""
    model = tmp_path / "model"
    chatml_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps(MODEL_CONFIG))
    shutil.copytree(model, tmp_path / "scorer")
    write_llama(model, MODEL_CONFIG)
    write_llama(tmp_path / "scorer", MODEL_CONFIG, score=True)
    pairs = [
        {"prompt": f"pear apple {n}", "chosen": "apple pear", "rejected": "pear", "completion": "apple"}
        for n in range(64)
    ]
    write_jsonl(tmp_path / "data.jsonl", pairs)
    common = "run: {dir: run}\ndata: {train: data.jsonl, eval: data.jsonl, max_prompt_tokens: 256}\n"
    role = "{model: {path: model}}"
    (tmp_path / "sft.yaml").write_text(f"kind: sft\n{common}actor: {role}\n")
    (tmp_path / "rm.yaml").write_text(f"kind: rm\n{common}reward: {role}\n")
    roles = "".join(f"{name}: {role}\n" for name in ("actor", "critic", "reference"))
    roles += "reward_model: {model: {path: scorer}}\n"
    (tmp_path / "ppo.yaml").write_text(f"kind: ppo\n{common}{roles}")
    (tmp_path / "helper.py").write_text("def length(text): return float(len(text))\n")
    (tmp_path / "length.py").write_text(
        "from helper import length\n"
        "def score(prompts, responses, labels, metadata): return [length(response) for response in responses]\n"
        "def short(response): return 1.0\n"
        "async def wait(prompt, response, label, metadata): return 1.0\n"
    )
    (tmp_path / "broken.py").write_text("def score(prompt, response, label, metadata)\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails. Return the one line that a user's error prints."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_config_prints_yaml_that_reads_back_the_same(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--print", "--config", "ppo.yaml", "actor.optimizer.lr=3e-6", "rollout.dtype=bf16"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 3.0e-06" in printed
    assert "[sequences, at least 1]" in printed
    (work / "again.yaml").write_text(printed)
    assert main(["config", "--print", "--config", "again.yaml"]) == 0
    assert capsys.readouterr().out == printed


def test_config_shows_what_is_missing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "short.yaml").write_text("kind: sft\nrun: {dir: '${oc.env:NOWHERE_TO_GO}'}\n")
    assert main(["config", "--print", "--config", "short.yaml"]) == 0
    captured = capsys.readouterr()
    assert "dir: ${oc.env:NOWHERE_TO_GO}" in captured.out
    assert "actor.model.path, data.train" in captured.err


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sft", ["assistant\n  [[apple<|im_end|>]]", "optimizer steps, 1.00 passes over the data", "train model on"]),
        ("rm", ["chosen: <|im_start|>user", "[[pear<|im_end|>]]", "pairs per optimizer step", "train a reward model"]),
        (
            "ppo",
            ["<|im_start|>assistant\n  [[]]", "prompts per PPO step", "critic micro-batches", "score them with scorer"],
        ),
    ],
)
def test_validate_says_what_a_run_would_do(
    work: Path, capsys: pytest.CaptureFixture[str], kind: str, expected: list[str]
) -> None:
    before = sorted(work.rglob("*"))
    assert main(["validate", "--config", f"{kind}.yaml"]) == 0
    printed = capsys.readouterr().out
    for text in [*expected, "memory (hetero-ppo plan says more)\n  device  ", "on the fullest node"]:
        assert text in printed
    assert sorted(work.rglob("*")) == before


def test_validate_and_plan_take_a_run_without_a_critic(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Roles, batching, plan and summary leave it out; its section of the file is gone with ``critic=null``."""
    options = [
        "--config",
        "ppo.yaml",
        "algorithm.advantage=group_mean",
        "critic=null",
        "critic.micro_batch_size=3",
        "critic=null",
    ]
    with registered():
        assert main(["validate", *options]) == 0
        printed = capsys.readouterr().out
        assert "critic" not in printed and "score them with scorer, and train actor, and write" in printed
        assert main(["plan", *options]) == 0
        printed = capsys.readouterr().out
        assert "critic" not in printed and "values" not in printed and "train_actor" in printed
        assert "set critic: null" in failure(
            capsys, "validate", "--config", "ppo.yaml", "algorithm.advantage=group_mean"
        )
        assert "set critic: null" in failure(capsys, "plan", "--config", "ppo.yaml", "algorithm.advantage=group_mean")
    assert "algorithm.advantage=group_mean: no such estimator" in failure(capsys, "validate", *options)


def test_validate_takes_a_run_with_the_size_of_a_gpu_for_one_on_gpus(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says of what device the open dtypes are, and compares with the limit."""
    for options, dtype, place in (
        (["--device-gib", "40"], "bf16", "MiB of 40960.00 in train"),
        ([], "fp32", "MiB (the CPU) in train"),
    ):
        assert main(["validate", "--config", "rm.yaml", *options]) == 0
        printed = capsys.readouterr().out
        device = "CUDA" if options else "a CPU"
        assert f"note         {dtype} for reward.model.dtype: the default on {device}\n" in printed
        assert re.search(rf"^reward .*: {dtype}, tensor 1", printed, re.MULTILINE)
        assert place in printed
    assert "--device-gib is -1.0" in failure(capsys, "validate", "--config", "rm.yaml", "--device-gib", "-1")


def test_validate_uses_the_world_size(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", "sft.yaml", "--world-size", "4", "actor.parallel.tensor=2"]) == 0
    assert "tensor 2 x pipeline 1 x data 2 on 4 processes" in capsys.readouterr().out
    message = failure(capsys, "validate", "--config", "sft.yaml", "--world-size", "3", "actor.parallel.tensor=2")
    assert "do not divide the world size 3" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.parallel.tensor=4", "exceeds num_key_value_heads 2"),
        ("actor.parallel.pipeline=4", "num_hidden_layers 2 is not a multiple of pipeline 4"),
        ("actor.parallel.expert=2", "model_type 'llama' is dense, use 1"),
    ],
)
def test_a_model_that_does_not_fit_its_layout(
    work: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    """Said from config.json alone, by validate and by train, before anything is built."""
    printed = failure(capsys, "validate", "--config", "ppo.yaml", "--world-size", "4", override)
    assert "actor (actor.model.path=model in actor.parallel): " in printed and message in printed


@pytest.mark.parametrize(
    "case",
    [
        (["actor.optimzer.lr=3"], "did you mean 'actor.optimizer'?"),
        (["data.train=nothing.jsonl"], "data.train=nothing.jsonl: no such file"),
        (["actor.model.path=nowhere"], "actor.model.path=nowhere: no such folder"),
        (["data.max_prompt_tokens=8"], "64 of 64 rows are longer than data.max_prompt_tokens=8"),
        (["data.max_prompt_tokens=1000"], "max_position_embeddings 1024"),
        (["algorithm.minibatch_size=48"], "the nearest multiple is 48 or 96"),
        (["algorithm.critic_warmup_steps=1"], "the run has 1 PPO steps, so the actor would never be trained"),
        ([*BY_FUNCTION, "reward.function=no_such_module:score"], "no module"),
        ([*BY_FUNCTION, "reward.function=broken.py:score"], "SyntaxError: expected ':' (", "broken.py:1)"),
        ([*BY_FUNCTION, "reward.function=length.py:score", "reward.concurrency=2"], "reward.concurrency is 2, but"),
        (["train.eval_function=length.py:short"], "train.eval_function is 'length.py:short': it takes (response)"),
        (["data.chat_template=template.jinja"], "data.chat_template=template.jinja: no such file"),
    ],
)
def test_each_mistake_is_one_clear_line(
    work: Path, capsys: pytest.CaptureFixture[str], case: tuple[list[str], ...]
) -> None:
    overrides, *messages = case
    printed = failure(capsys, "validate", "--config", "ppo.yaml", *overrides)
    assert [message for message in messages if message not in printed] == [], printed


def test_validate_imports_the_functions_as_a_run_does(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    functions = ["reward.function=length.py:score", "train.eval_function=length.py:wait"]
    options = ["reward.batch=8", "reward.workers=3"]
    assert main(["validate", "--config", "ppo.yaml", *BY_FUNCTION, *functions, *options]) == 0
    printed = capsys.readouterr().out
    assert (
        "reward.function length.py:score: up to 8 responses a call, 60 s at most; up to 3 worker processes (reward.workers)"
        in printed
    )
    assert (
        "train.eval_function length.py:wait: one response a call, 60 s at most; up to 3 worker processes (reward.workers), 64"
        in printed
    )


@pytest.mark.parametrize("command", ["validate", "train"])
def test_a_run_that_does_not_fit_is_not_begun(work: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    before = sorted(work.rglob("*"))
    message = failure(capsys, command, "--config", "ppo.yaml", "residency.host_gib=0.001")
    assert "the run does not fit: host memory of a node" in message
    assert sorted(work.rglob("*")) == before


def test_a_malformed_line_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (work / "data.jsonl").open("a") as file:
        file.write('{"prompt": "half\n')
    assert "data.jsonl, line 65: not valid JSON" in failure(capsys, "validate", "--config", "sft.yaml")


def test_a_reward_model_with_another_template_is_refused_or_reads_texts_anew(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(capsys, "validate", "--config", "ppo.yaml", "reward_model.re_encode.max_tokens=99")
    assert "reward_model.re_encode: the tokenizer and template in scorer are those of model" in message
    template = work / "scorer" / "chat_template.jinja"
    assert template.is_file()
    template.write_text("{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}")
    scorer = ("validate", "--config", "ppo.yaml", "reward_model.model.path=scorer")
    assert "reward_model: the tokenizer in scorer has another chat template" in failure(capsys, *scorer)
    assert main([*scorer, "reward_model.re_encode.max_tokens=99"]) == 0
    template.write_text("{{ raise_exception('no') }}")
    message = failure(capsys, *scorer, "reward_model.re_encode.max_tokens=99")
    assert "reward_model.re_encode: the chat template does not take messages of the roles user" in message


def test_roles_with_other_tokens_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = work / "other"
    tokenizer_files = {path.name: path.read_bytes() for path in (work / "scorer").iterdir()}
    other.mkdir()
    for name, content in tokenizer_files.items():
        (other / name).write_bytes(content)
    description = json.loads((other / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    first, last = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(description))
    message = failure(capsys, "validate", "--config", "ppo.yaml", "reward_model.model.path=other")
    assert "reward_model: the tokenizer in other has another vocabulary" in message
    assert "2 tokens differ" in message and "or set reward_model.re_encode.max_tokens" in message
    assert (
        main(
            [
                "validate",
                "--config",
                "ppo.yaml",
                "reward_model.model.path=other",
                "reward_model.re_encode.max_tokens=99",
            ]
        )
        == 0
    )
    expected = "reward_model: prompts and responses are decoded with the tokenizer in model (310 tokens, sha256 "
    assert expected in capsys.readouterr().out

    (work / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG | {"vocab_size": 100}))
    message = failure(capsys, "validate", "--config", "sft.yaml")
    num_tokens = max(vocabulary.values()) + 1
    assert (
        f"actor.model.path=model: the model has 100 embedding rows, and the tokenizer in model has {num_tokens} tokens"
        in message
    )


def test_a_tokenizer_without_a_template_needs_a_choice(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "model" / "chat_template.jinja").unlink()
    message = failure(capsys, "validate", "--config", "sft.yaml")
    assert "has no chat template; set data.chat_template" in message
    assert main(["validate", "--config", "sft.yaml", "data.apply_chat_template=false"]) == 0
    assert "pear apple 0[[apple<|im_end|>]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": "{}"}, "a LoRA adapter, which would not be loaded. Merge it into its model with peft"),
        (
            {"pytorch_model.bin": "", "model.safetensors": None},
            "weights as pytorch_model.bin and no *.safetensors file",
        ),
        (
            {"model.safetensors.index.json": '{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'},
            "lists model-00002-of-00002.safetensors, but there is no such file; complete the download",
        ),
        (
            {"config.json": json.dumps(MODEL_CONFIG | {"quantization_config": {"bits": 4}})},
            "give the unquantised checkpoint",
        ),
        (
            {"config.json": json.dumps(MODEL_CONFIG | {"vocab_size": 400})},
            "lm_head.weight has shape [320, 64], the config asks for [400, 64]",
        ),
        (
            {"config.json": json.dumps(MODEL_CONFIG | {"eos_token_id": 320})},
            "= 320 (config.json) has no embedding row, of which the model has 320",
        ),
        ({"generation_config.json": '{"eos_token_id": [2, "x"]}'}, "eos_token_id is [2, 'x']; it has to be a token id"),
    ],
)
def test_a_model_folder_that_cannot_be_used(
    work: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str | None], message: str
) -> None:
    for name, text in files.items():
        file = work / "model" / name
        file.unlink() if text is None else file.write_text(text)
    for command in ("validate", "train"):
        assert message in failure(capsys, command, "--config", "sft.yaml")


def test_validate_reports_the_heads_ends_and_options_of_a_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert main(["validate", "--config", "ppo.yaml", "algorithm.truncation_score=-2"]) == 0
    printed = capsys.readouterr().out
    assert (
        "ends         '<|im_end|>' = 2 (tokenizer, generation_config.json) or '<|endoftext|>' = 0 (generation_config.json)"
        in printed
    )
    assert "critic       score.weight will be initialised: the checkpoint has none" in printed
    assert "note         algorithm.truncation_score=-2.0 is not used: " in printed
    assert "data.jsonl: fields that are not read: chosen, completion, rejected" in printed
    assert "data.jsonl: label 'label' (data.label_key): no row has one" in printed
    message = failure(capsys, "validate", "--config", "ppo.yaml", "reward_model.model.path=model")
    assert "reward_model.model.path=model: the checkpoint has no score head (score.weight)" in message
    message = failure(capsys, "validate", "--config", "ppo.yaml", "rollout.sampling.stop_token_ids=[2,400]")
    assert "rollout.sampling.stop_token_ids: 400 has no embedding row" in message


def test_our_own_faults_keep_their_traceback(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(config_command, "run", broken)
    with pytest.raises(KeyError):
        main(["config", "--config", "sft.yaml"])
    with pytest.raises(ValueError, match="unknown key"):
        monkeypatch.undo()
        main(["--traceback", "config", "--config", str(work / "sft.yaml"), "nope=1"])


def test_the_version_is_that_of_setup_and_of_the_citation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    root = Path(__file__).parents[2]
    stated = re.search(r'version="([\d.]+)"', (root / "setup.py").read_text())
    assert ended.value.code == 0 and stated is not None
    assert capsys.readouterr().out == f"hetero-ppo {stated[1]}\n"
    assert f"\nversion: {stated[1]}\n" in (root / "CITATION.cff").read_text()


def test_every_command_is_there_and_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """Nor does a run whose configuration has a mistake."""
    (tmp_path / "wrong.yaml").write_text("kind: sft\ntrian: 3\n")
    assert {"config", "validate", "plan", "train", "export", "tokenizer", "init-model", "report"} <= set(
        build_parser().format_help().split()
    )
    code = (
        "import sys, hetero_ppo.cli.main, hetero_ppo.data.files\n"
        f"assert hetero_ppo.cli.main.main(['train', '--config', {str(tmp_path / 'wrong.yaml')!r}]) == 2\n"
        "heavy = {'torch', 'transformers', 'megatron', 'vllm', 'pyarrow', 'matplotlib', 'numpy'}\n"
        "print(heavy & set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.strip() == "set()"


def test_a_world_of_one_process_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    before = dict(os.environ)
    with pytest.raises(ValueError, match="of the command"), single_process():
        assert os.environ["LOCAL_WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"] == "0"
        os.environ["GLOO_SOCKET_IFNAME"] = "of the command"
        raise ValueError("of the command")
    assert dict(os.environ) == before
