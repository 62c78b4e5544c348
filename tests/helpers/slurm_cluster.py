"""A Slurm of one node for a test: munged, slurmctld and slurmd of this machine, in a folder and on ports of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.ranks import outer_environment

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
#: A low partition whose jobs are preempted by those of a high one: they get the signal of --signal, and 90 s.
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=90 OverSubscribe=NO State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF OverSubscribe=NO State=UP
"""


def why_not() -> str | None:
    """Return the reason why Slurm cannot run on this machine, or None when it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "munged and slurmctld of a test need root"


class SlurmCluster:
    """Runs Slurm's commands against the test's own daemons."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**outer_environment(), "SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str, **env: str) -> str:
        """Run a Slurm command. Return its output."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job_state(self, job: str) -> str:
        """Return the state of a job: RUNNING, PENDING, COMPLETED, ..."""
        fields = dict(part.split("=", 1) for part in self.call("scontrol", "show", "job", job).split() if "=" in part)
        return fields["JobState"]


@contextmanager
def slurm_cluster(root: Path) -> Iterator[SlurmCluster]:
    """Start the daemons; none survives the block."""
    host = socket.gethostname().split(".")[0]
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = {"ctld_port": first.getsockname()[1], "d_port": second.getsockname()[1]}
    for name in ("munge", "state", "spool"):
        (root / name).mkdir(mode=0o755)
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, cpus=os.cpu_count(), **ports))
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = SlurmCluster(root)
    munge = [f"--{name}={root}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-f", str(root / "slurm.conf")],
        ["slurmd", "-D", "-f", str(root / "slurm.conf")],
    ]
    daemons = []
    try:
        for command in commands:
            with (root / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, env=cluster.env, stdout=out, stderr=subprocess.STDOUT))
            time.sleep(1)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
