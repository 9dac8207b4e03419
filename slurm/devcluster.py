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
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A slot is what keeps clusters of one machine apart: 100 ports, and the addresses 127.1.<slot>.x
NUM_SLOTS, FIRST_PORT, PORTS_PER_SLOT, FIRST_NODE_OFFSET = 100, 10000, 100, 11
MAX_NODES = PORTS_PER_SLOT - FIRST_NODE_OFFSET
MAX_SOCKET_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LOCK_FILE = "devcluster.pid"
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
MaxArraySize={max_array_size}
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

# Durability is of no use, the folder is deleted at the end
DATABASE_OPTIONS = """\
--skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-lock-wait-timeout=900
--innodb-flush-log-at-trx-commit=0 --sync-binlog=0 --skip-log-bin --performance-schema=OFF"""

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
    if os.geteuid() != 0 or not binary("unshare"):
        return False
    return subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


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
    if not (root / LOCK_FILE).exists():
        return 0
    with open(root / LOCK_FILE) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the kernel frees a lock however its owner ends
        except BlockingIOError:
            return int(lock.read() or 0)
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
    command = [binary("slurmd"), "-D", "-N", name]
    slurmd = subprocess.Popen(command, preexec_fn=tied_to_owner(signal.SIGKILL))  # noqa: PLW1509 (no threads here)

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
    while root.exists() and not owner_pid(root) and time.monotonic() < deadline:
        shutil.rmtree(root, ignore_errors=True)  # again if a daemon, dying at the same moment, has still written
        time.sleep(0.05)


class Cluster:
    """A cluster in the folder root. Call up() from a thread that lives on: the kernel ends the daemons with it."""

    def __init__(
        self,
        root: Path | str,
        *,
        num_nodes: int = 4,
        gpus_per_node: int = 4,
        cpus_per_node: int = 8,
        accounting: bool = True,
        max_array_size: int = 10001,
    ) -> None:
        self.root = Path(root).resolve()
        self.max_array_size = max_array_size
        self.num_nodes, self.gpus_per_node, self.cpus_per_node = num_nodes, gpus_per_node, cpus_per_node
        self.accounting = accounting
        self.namespaces = can_have_namespaces()  # False before up(): nodes as those have them who are not root
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
        if self._processes:
            raise ClusterError(f"{self.root}: this cluster is up already; stop() it first")
        try:
            self._claim_root()
            self._claim_slot()
            self._write_configuration()
            self._start_munged()
            if self.accounting:
                self._start_accounting()
            self._start_controller()
            for node_index in range(self.num_nodes):
                self._start_node(node_index)
            self._wait("slurmctld", lambda: self._node_states() == ["idle"] * self.num_nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kills jobs and daemons and removes the folder; does nothing on a cluster that is not up."""
        for name in self.node_names:
            self._switch_off(name)
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
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

    def restart_controller(self) -> None:
        """Kills slurmctld and starts it again; what was submitted in the last seconds may be forgotten."""
        controller = self._processes.pop("slurmctld")
        os.killpg(controller.pid, signal.SIGKILL)
        controller.wait()
        self._start_controller()

    def _start_controller(self) -> None:
        self._start("slurmctld", [binary("slurmctld"), "-D"], lambda: is_listening(("127.0.0.1", self._port(0))))

    def _port(self, offset: int) -> int:
        return FIRST_PORT + PORTS_PER_SLOT * self.slot_index + offset

    def _node_port(self, node_index: int) -> int:
        return self._port(FIRST_NODE_OFFSET + node_index)

    def _address(self, node_index: int) -> str:
        return f"127.1.{self.slot_index}.{FIRST_NODE_OFFSET + node_index}"

    def _node_states(self) -> list[str]:
        command = [binary("sinfo"), "-h", "-N", "-p", "main", "-o", "%T"]
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.split()

    def _claim_root(self) -> None:
        """Makes the folder ours alone: a lock for others to see, and somebody to remove it if we cannot."""
        if pid := owner_pid(self.root):
            raise ClusterError(f"{self.root}: a cluster is up here (process {pid}); use `shell`, or end it with `down`")
        if not self.root.parent.is_dir():
            raise ClusterError(f"{self.root}: the folder above does not exist; create it")
        if (self.root / LOCK_FILE).exists():
            shutil.rmtree(self.root)  # remains of a cluster that went off with the machine
        if self.root.exists() and any(self.root.iterdir()):
            raise ClusterError(f"{self.root}: is not empty and no cluster, and would be deleted at the end; name a new folder")
        for folder in ("dev", "etc", "log", "munge", "spool", "state"):
            (self.root / folder).mkdir(parents=True)
        lock = os.open(self.root / LOCK_FILE, os.O_CREAT | os.O_WRONLY)
        self._claims.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, b"%d" % os.getpid())
        command = [sys.executable, "-I", __file__, "_sweep", str(self.root)]
        sweeper = self._claims.enter_context(self._spawn("sweeper", command, signal.SIGTERM))
        self._claims.callback(sweeper.kill)
        self._claims.callback(shutil.rmtree, self.root)

    def _claim_slot(self) -> None:
        """Takes the first slot that no other cluster has and whose ports nobody else uses."""
        ports = [0, 1, *range(FIRST_NODE_OFFSET, FIRST_NODE_OFFSET + self.num_nodes)]
        for self.slot_index in range(NUM_SLOTS):
            claim = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                claim.bind(f"\0slurm-devcluster-{self.slot_index}")  # abstract: no file, and gone with this process
                if all(is_free(self._port(offset)) for offset in ports):
                    self._claims.enter_context(claim)
                    break
            claim.close()
        else:
            last_port = FIRST_PORT + NUM_SLOTS * PORTS_PER_SLOT - 1
            found = f"no {PORTS_PER_SLOT} free ports in a row between {FIRST_PORT} and {last_port}"
            raise ClusterError(f"{self.root}: {found}; stop other clusters, `ss -ltnp` shows who listens")
        name = max(self.node_names, key=len)
        longest = f"{self.root}/spool/{name}/{name}_{60_000_000}.{2**32 - 1}"  # a job step's socket; munge's is shorter
        if (excess := len(longest) - MAX_SOCKET_PATH_BYTES) > 0:
            raise ClusterError(f"{self.root}: too long by {excess} characters for the sockets inside; take a shorter path")

    def _write_configuration(self) -> None:
        etc, names = self.root / "etc", self.node_names
        common = {"root": self.root, "user": pwd.getpwuid(os.geteuid()).pw_name}
        nodes = [
            f"NodeName={name} NodeHostname={name if self.namespaces else 'localhost'} NodeAddr={self._address(index)} "
            f"Port={self._node_port(index)} CPUs={self.cpus_per_node} RealMemory=32000 TmpDisk=0 "
            f"Gres=gpu:{self.gpus_per_node} State=UNKNOWN"
            for index, name in enumerate(names)
        ]
        accounting = ACCOUNTING_CONF.format(port=self._port(1), **common) if self.accounting else ""
        slurm_conf = SLURM_CONF.format(
            port=self._port(0),
            first_job_id=1 + int(time.time() * 8) % 60_000_000,  # SLURM's largest is 67,043,328
            max_array_size=self.max_array_size,
            accounting=accounting or "AccountingStorageType=accounting_storage/none",
            nodes="\n".join(nodes),
            node_names=",".join(names),
            **common,
        )
        gpus = [self.root / f"dev/gpu{index}" for index in range(self.gpus_per_node)]
        for gpu in gpus:
            gpu.symlink_to("/dev/null")  # SLURM wants a device; with a plain file it leaves CUDA_VISIBLE_DEVICES unset
        hosts = "".join(f"{self._address(index)} {name}\n" for index, name in enumerate(names))
        (etc / "slurm.conf").write_text(slurm_conf)
        (etc / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File={gpu}\n" for name in names for gpu in gpus))
        (etc / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        (etc / "slurmdbd.conf").touch(mode=0o600)
        (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(port=self._port(1), **common))

    def _spawn(self, name: str, command: Sequence[str], death_signal: signal.Signals) -> subprocess.Popen[bytes]:
        with open(self.root / f"log/{name}.out", "ab") as log:
            return subprocess.Popen(
                command,
                # slurmdbd has no other way to learn the database's socket
                env=os.environ | self.environment | {"MYSQL_UNIX_PORT": f"{self.root}/database.sock"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                start_new_session=True,  # Ctrl-C is for the owner
                preexec_fn=tied_to_owner(death_signal),  # noqa: PLW1509 (it takes no lock)
            )

    def _start(self, name: str, command: Sequence[str], is_ready: Callable[[], bool]) -> None:
        self._processes[name] = self._spawn(name, command, signal.SIGKILL)
        self._wait(name, is_ready)

    def _wait(self, name: str, is_ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            status = self._processes[name].poll()
            if is_ready():
                return
            if status is not None or time.monotonic() > deadline:
                found = f"not ready after {seconds} s" if status is None else f"ended with status {status}"
                lines = (self.root / f"log/{name}.out").read_text(errors="replace").splitlines()[-15:]
                raise ClusterError("\n".join([f"{name}: {found}; the end of its log:", *lines]))
            time.sleep(0.02)

    def _start_munged(self) -> None:
        folder = self.root / "munge"
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(os.urandom(128))
        files = {"key-file": "key", "socket": "munge.sock", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={folder}/{file}" for option, file in files.items()]
        # --force: folders that others may write to, such as those below /tmp, become a warning
        command = [binary("munged"), "--foreground", "--force", "--num-threads=4", *options]
        self._start("munged", command, lambda: is_listening(f"{folder}/munge.sock"))

    def _start_accounting(self) -> None:
        root, user = self.root, pwd.getpwuid(os.geteuid()).pw_name
        common = ["--no-defaults", f"--datadir={root}/database", f"--user={user}", f"--tmpdir={root}"]
        install = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        command = [binary("mariadb-install-db"), *common, *install]
        self._start("mariadb-install-db", command, lambda: self._processes["mariadb-install-db"].poll() == 0)
        (root / "etc/database.sql").write_text(DATABASE_SQL)
        files = [f"--socket={root}/database.sock", f"--pid-file={root}/mariadbd.pid", f"--init-file={root}/etc/database.sql"]
        command = [binary("mariadbd"), *common, *files, *DATABASE_OPTIONS.split()]
        self._start("mariadbd", command, lambda: is_listening(f"{root}/database.sock"))
        # Before slurmctld, which asks it for the list of resources and dies without an answer
        self._start("slurmdbd", [binary("slurmdbd"), "-D"], lambda: is_listening(("127.0.0.1", self._port(1))))

    def _start_node(self, node_index: int) -> None:
        name = self.node_names[node_index]
        if self.namespaces:
            command = [*NAMESPACES, "bash", "-ec", NODE_SCRIPT, "bash", name, f"{self.root}/etc/hosts", binary("slurmd")]
            self._processes[name] = self._spawn(name, command, signal.SIGKILL)
        else:
            command = [sys.executable, "-I", __file__, "_node", name]
            self._processes[name] = self._spawn(name, command, signal.SIGTERM)

    def _switch_off(self, name: str) -> bool:
        """Whether the node was on."""
        process = self._processes.pop(name, None)
        if process is None or process.poll() is not None:
            return False
        while process.poll() is None:
            if self.namespaces:
                # The death of the namespace's process 1 is that of all in it, and unshare waits for it
                kill_all(children_of(process.pid) or [process.pid])
            else:
                process.terminate()
            time.sleep(0.005)
        return True


def live_environment(root: Path) -> dict[str, str]:
    if not owner_pid(root):
        raise ClusterError(f"{root}: no cluster is up here; start one with `up` or `serve`")
    return os.environ | {"SLURM_CONF": str(root / "etc/slurm.conf")}


def serve(cluster: Cluster) -> None:
    """Until Ctrl-C, SIGTERM or the terminal's end."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # one is enough, the next would interrupt the cleaning
        sys.exit(0)

    for number in signals:
        signal.signal(number, leave)
    with cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        while True:
            signal.pause()


def up_in_background(serve_arguments: Sequence[str]) -> int:
    """Leaves a `serve` behind, in a session of its own; it prints one line when it is ready, or why it is not."""
    command = [sys.executable, __file__, "serve", *serve_arguments]
    pipe, null, both = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
    server = subprocess.Popen(command, stdin=null, stdout=pipe, stderr=both, text=True, start_new_session=True)
    assert server.stdout is not None  # it is a pipe
    try:
        line = server.stdout.readline()
        if line.startswith("export "):
            sys.stdout.write(line)
            return 0
        sys.stderr.write(line + server.stdout.read())
        return server.wait()
    except BaseException:
        server.terminate()
        raise


def down(root: Path) -> None:
    live_environment(root)
    pid = owner_pid(root)
    if b"serve" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
        raise ClusterError(f"{root}: belongs to process {pid}, which is no `serve`; it ends its cluster itself")
    server = os.pidfd_open(pid)
    signal.pidfd_send_signal(server, signal.SIGTERM)
    if not select.select([server], [], [], 60)[0]:
        raise ClusterError(f"{root}: process {pid} has not ended after 60 s; kill -9 it, the rest goes with it")


def status(root: Path) -> None:
    environment = live_environment(root)
    print(f"process {owner_pid(root)}, export SLURM_CONF={environment['SLURM_CONF']}", flush=True)
    for command in (["sinfo"], ["squeue", "--all"]):
        subprocess.run(command, env=environment, check=False)


def shell(root: Path, words: Sequence[str]) -> None:
    command = list(words) or [os.environ.get("SHELL", "/bin/sh")]
    os.execvpe(command[0], command, live_environment(root))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="devcluster.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["up", "down", "status", "shell", "serve"])
    parser.add_argument(
        "root", metavar="ROOT", type=lambda text: Path(text).resolve(), help="the cluster's folder, new or empty"
    )
    parser.add_argument("words", metavar="-- COMMAND", nargs="*", help="shell: what to run (default: $SHELL)")
    group = parser.add_argument_group("up and serve")
    group.add_argument("--nodes", type=int, default=4, help="default: 4")
    group.add_argument("--gpus-per-node", type=int, default=4, help="pretend GPUs (default: 4)")
    group.add_argument("--cpus-per-node", type=int, default=8, help="processors for SLURM to give away (default: 8)")
    group.add_argument(
        "--accounting", action=argparse.BooleanOptionalAction, default=True, help="with a database: sacct works, 2 s more"
    )
    group.add_argument(
        "--max-array-size", type=int, default=10001, metavar="N", help="elements of a job array (default: 10001; SLURM's: 1001)"
    )
    options = parser.parse_args(arguments)
    if options.words and options.command != "shell":
        parser.error(f"{options.command} ROOT takes nothing more, found: {' '.join(options.words)}")
    return options


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["_node"]:  # a running cluster's helpers
        keep_node(arguments[1])
        return 0
    if arguments[:1] == ["_sweep"]:
        sweep(Path(arguments[1]))
        return 0
    options = parse(arguments)
    try:
        match options.command:
            case "up":
                return up_in_background(arguments[1:])
            case "down":
                down(options.root)
            case "status":
                status(options.root)
            case "shell":
                shell(options.root, options.words)
            case "serve":
                cluster = Cluster(
                    options.root,
                    num_nodes=options.nodes,
                    gpus_per_node=options.gpus_per_node,
                    cpus_per_node=options.cpus_per_node,
                    accounting=options.accounting,
                    max_array_size=options.max_array_size,
                )
                serve(cluster)
    except (ClusterError, ValueError, OSError) as error:
        print(f"devcluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
