#!/usr/bin/env python3
"""A real SLURM cluster on one machine: several nodes with pretend GPUs, up in seconds, gone without trace.

It knows nothing of what runs on it: a client needs SLURM_CONF in its environment and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# A slot is what keeps clusters of one machine apart: 100 ports, and the addresses 127.1.<slot>.x
NUM_SLOTS, FIRST_PORT, PORTS_PER_SLOT, FIRST_NODE_OFFSET = 100, 10000, 100, 11
MAX_NODES = PORTS_PER_SLOT - FIRST_NODE_OFFSET
MAX_SOCKET_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")

SLURM_CONF = """\
ClusterName=dev
SlurmctldHost=localhost
SlurmctldPort={port}
AuthType=auth/munge
# A requeued job waits cred_expire + 1 s; below KillWait + 3 it meets its dying predecessor and the node is drained
AuthInfo=socket={root}/munge/munge.sock,cred_expire=8
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
PropagateResourceLimits=NONE
# Nodes may declare more processors and memory than the machine has
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=5,sched_min_interval=0,default_queue_depth=2000,\
nohold_on_prolog_fail
# In SchedulerParameters, where older manuals put it, SLURM 22.05 ignores it silently
DependencyParameters=kill_invalid_depend
# submitit learns of a preemption by its own signal
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
InactiveLimit=0
MinJobAge=300
CompleteWait=0
MessageTimeout=5
SlurmctldTimeout=30
SlurmdTimeout=5
ReturnToService=2
# From the clock: a repeated id would let submitit take an older job's result for a new one
FirstJobId={first_job_id}
# Otherwise 5 of 4 nodes are accepted and pend for ever
EnforcePartLimits=ALL
MaxArraySize=10001
MaxJobCount=50000
{accounting}
{nodes}
PartitionName=main Nodes={node_names} Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=10
PartitionName=high Nodes={node_names} MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""

# slurmctld and sacct ignore AuthInfo towards slurmdbd: there AccountingStoragePass is munge's socket
ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={root}/munge/munge.sock
AccountingStorageTRES=gres/gpu"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={root}/log/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""

DATABASE_SQL = """\
CREATE DATABASE slurm_acct;
CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO 'slurm'@'localhost';
"""

# Durability is of no use here, the folder is deleted at the end
DATABASE_OPTIONS = (
    "--skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-lock-wait-timeout=900 "
    "--innodb-flush-log-at-trx-commit=0 --sync-binlog=0 --skip-log-bin --performance-schema=OFF"
).split()

# bash is the namespace's process 1: it reaps the job steps that slurmd leaves behind
NODE_SCRIPT = 'hostname "$1"; mount --bind "$2" /etc/hosts; "$3" -D -N "$1" & wait $!'

EXAMPLES = """\
examples:
  python slurm/devcluster.py serve /tmp/c                    in the foreground until Ctrl-C
  eval "$(python slurm/devcluster.py up /tmp/c)"             in the background; sinfo, srun, sbatch now work here
  python slurm/devcluster.py up /tmp/c --nodes 2 --gpus-per-node 8 --no-accounting
  python slurm/devcluster.py shell /tmp/c -- srun -N4 hostname
  python slurm/devcluster.py status /tmp/c
  python slurm/devcluster.py down /tmp/c                     jobs, daemons and folder are gone
"""


class ClusterError(Exception):
    """The cluster cannot be started, found or stopped; the message says what to do."""


def binary(name: str) -> str:
    """Path of a program; the daemons live in /usr/sbin, which users seldom have in PATH. Empty if missing."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin") or ""


def missing_binaries(*, accounting: bool) -> list[str]:
    needed = ["munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch", "scontrol"]
    needed += ["slurmdbd", "sacct", "mariadbd", "mariadb-install-db", "my_print_defaults"] if accounting else []
    return [name for name in needed if not binary(name)]


def can_have_namespaces() -> bool:
    """Root in a container may lack the right to make them."""
    return os.geteuid() == 0 and subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


def is_listening(address: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        return client.connect_ex(address) == 0


def is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of a cluster just stopped are free
        try:
            server.bind(("", port))
        except OSError:
            return False
        return True


def owner_pid(root: Path) -> int:
    """Process that holds the cluster in root; 0 if there is no cluster, or only the remains of one."""
    try:
        with open(root / "owner.pid") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # freed by the kernel, however the owner ends
            except BlockingIOError:
                return int(lock.read())
    except FileNotFoundError:
        pass
    return 0


def children_of(parent_pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == parent_pid:
                children.append(int(stat.parent.name))
    return children


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def tied_to_owner(death_signal: signal.Signals) -> Callable[[], None]:
    """What a child runs before exec: the kernel then sends it death_signal when its owner ends, by kill -9 too."""
    libc, owner = ctypes.CDLL(None), os.getpid()
    blocked = {death_signal} - {signal.SIGKILL}  # who outlives the owner takes the signal by sigwait, never too early

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal))
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if os.getppid() != owner:
            os._exit(1)

    return before_exec


def keep_node(name: str) -> None:
    """A node without namespaces: slurmd, and at SIGTERM or the owner's end SIGKILL for it and all that its jobs started."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of slurmd become children of this process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    slurmd = subprocess.Popen([binary("slurmd"), "-D", "-N", name], preexec_fn=tied_to_owner(signal.SIGKILL))

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    while slurmd.poll() is None and signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
        reap()
    while orphans := children_of(os.getpid()):
        kill_all(orphans)
        reap()
        time.sleep(0.005)


def sweep(root: Path) -> None:
    """Removes the folder of an owner that could not: the kernel sends SIGTERM when the owner ends."""
    signal.sigwait({signal.SIGTERM})
    deadline = time.monotonic() + 20
    while root.exists() and time.monotonic() < deadline:  # daemons die at the same moment and may still write
        shutil.rmtree(root, ignore_errors=True)
        time.sleep(0.05)


class Cluster:
    """A cluster in the folder root. Call up() from a thread that lives on: the kernel ends the daemons with it."""

    def __init__(
        self, root: Path | str, *, num_nodes: int = 4, gpus_per_node: int = 4, cpus_per_node: int = 8, accounting: bool = True
    ) -> None:
        self.root = Path(root).resolve()
        self.num_nodes, self.gpus_per_node, self.cpus_per_node = num_nodes, gpus_per_node, cpus_per_node
        self.accounting = accounting
        self.namespaces = can_have_namespaces()
        self.slot_index = 0  # up() takes the first free one
        self._claims = contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        if not 1 <= num_nodes <= MAX_NODES or gpus_per_node < 0 or cpus_per_node < 1:
            found = f"{num_nodes} nodes, {gpus_per_node} GPUs and {cpus_per_node} processors each"
            raise ValueError(f"cluster: {found}; expected 1 to {MAX_NODES} nodes, 0 or more GPUs, 1 or more processors")
        if not re.fullmatch(r"[\w./+-]+", str(self.root), re.ASCII):
            raise ValueError(f"{self.root}: slurm.conf cannot hold this path; use letters, digits and . _ + - / only")

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"SLURM_CONF": str(self.root / "etc/slurm.conf")}

    @property
    def node_names(self) -> list[str]:
        """Names that resolve inside jobs: host names if nodes are namespaces, addresses otherwise."""
        if self.namespaces:
            return [f"node{index + 1}" for index in range(self.num_nodes)]
        return [self._address(index) for index in range(self.num_nodes)]

    def __enter__(self) -> Cluster:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def up(self) -> Cluster:
        """Returns when all nodes are idle."""
        if missing := missing_binaries(accounting=self.accounting):
            install = "apt-get install -y --no-install-recommends $(cat slurm/apt.txt)"
            raise ClusterError(f"SLURM is not complete, missing: {', '.join(missing)}; install it: {install}")
        self._claim_root()
        try:
            self._claim_slot()
            self._write_configuration()
            self._start("sweeper", [sys.executable, "-I", __file__, "_sweep", str(self.root)], death_signal=signal.SIGTERM)
            self._start_munged()
            if self.accounting:
                self._start_accounting()
            self._start("slurmctld", [binary("slurmctld"), "-D"])
            self._wait("slurmctld", lambda: is_listening(("127.0.0.1", self._port(0))))
            for node_index in range(self.num_nodes):
                self._start_node(node_index)
            self._wait("slurmctld", lambda: self._node_states() == ["idle"] * self.num_nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kills jobs and daemons and removes the folder; does nothing on a cluster that is not up."""
        if not self._processes:
            self._claims.close()
            return
        for node_index in range(self.num_nodes):
            self._switch_off(self.node_names[node_index])
        sweeper = self._processes.pop("sweeper")
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()
        shutil.rmtree(self.root)
        sweeper.kill()
        sweeper.wait()
        self._claims.close()

    def power_cut(self, node_index: int) -> None:
        """Kills slurmd and every process of its jobs at once; SLURM has to find out by itself."""
        if not self._switch_off(self.node_names[node_index]):
            raise ClusterError(f"{self.node_names[node_index]}: is off already; start_slurmd({node_index}) switches it on")

    def start_slurmd(self, node_index: int) -> None:
        """Switches a node on again; SLURM takes it back within a second."""
        name = self.node_names[node_index]
        if name in self._processes and self._processes[name].poll() is None:
            raise ClusterError(f"{name}: is running; power_cut({node_index}) switches it off")
        self._start_node(node_index)
        self._wait(name, lambda: is_listening((self._address(node_index), self._node_port(node_index))))

    def _port(self, offset: int) -> int:
        return FIRST_PORT + PORTS_PER_SLOT * self.slot_index + offset

    def _node_port(self, node_index: int) -> int:
        return self._port(FIRST_NODE_OFFSET + node_index)

    def _address(self, node_index: int) -> str:
        return f"127.1.{self.slot_index}.{FIRST_NODE_OFFSET + node_index}"
