"""The development cluster behaves as SLURM, and leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import devcluster
from slurm.devcluster import Cluster, ClusterError

pytestmark = pytest.mark.slurm
PROGRAM = [sys.executable, devcluster.__file__]


def run(cluster: Cluster, *command: str) -> str:
    environment = os.environ | cluster.environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """The job's id."""
    return run(cluster, "sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()


def eventually(read: Callable[[], object], expected: object, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


def states(cluster: Cluster, *job_ids: str) -> dict[str, str]:
    words = run(cluster, "squeue", "-h", "-r", "-t", "all", "-j", ",".join(job_ids), "-o", "%i %T").split()
    return dict(zip(words[::2], words[1::2], strict=True))


def processes_of(root: Path) -> list[str]:
    """Commands of living processes that mention root in their arguments or environment, this one aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            state = (process / "stat").read_bytes().rpartition(b")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        mentions = re.search(re.escape(bytes(root)) + rb"(?![\w.-])", arguments + b"\0" + environment)
        if mentions and state != b"Z" and process.name != str(os.getpid()):
            found.append(arguments.replace(b"\0", b" ").decode())
    return found


@pytest.fixture
def needs_slurm(cluster: Cluster) -> None:
    """Skips, or fails, as the cluster's own fixture does."""


def test_a_command_runs_on_four_nodes(cluster: Cluster) -> None:
    hosts = run(cluster, "srun", "-N4", "hostname").split()
    nodes = run(cluster, "srun", "-N4", "printenv", "SLURMD_NODENAME").split()
    assert sorted(nodes) == cluster.node_names
    assert sorted(hosts) == (cluster.node_names if cluster.namespaces else [socket.gethostname()] * 4)


def test_node_names_resolve_inside_jobs(cluster: Cluster) -> None:
    code = f"import socket; print(*(socket.gethostbyname(name) for name in {cluster.node_names}))"
    addresses = run(cluster, "srun", sys.executable, "-c", code).split()
    assert len(set(addresses)) == 4
    assert all(address.startswith("127.1.") for address in addresses)


def test_two_jobs_on_one_node_have_different_gpus(cluster: Cluster, tmp_path: Path) -> None:
    options = ["-w", cluster.node_names[0], "--gpus-per-node=2"]
    script = f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_JOB_ID; sleep 60"
    jobs = [submit(cluster, script, *options) for _ in range(2)]
    eventually(lambda: sorted(file.read_text().strip() for file in tmp_path.iterdir()), ["0,1", "2,3"])
    third = submit(cluster, "true", *options)
    run(cluster, "scancel", jobs[0])
    eventually(lambda: states(cluster, third), {third: "COMPLETED"})
    run(cluster, "scancel", jobs[1])


def test_more_gpus_than_a_node_has_are_refused(cluster: Cluster) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        submit(cluster, "true", "--gpus-per-node=5")
    assert "Requested node configuration is not available" in refusal.value.stderr


def test_a_failed_element_cancels_its_counterpart_alone(cluster: Cluster) -> None:
    first = submit(cluster, "test $SLURM_ARRAY_TASK_ID != 1", "--array=0-3")
    second = submit(cluster, "true", "--array=0-3", f"--dependency=aftercorr:{first}")
    expected = {f"{first}_{i}": "FAILED" if i == 1 else "COMPLETED" for i in range(4)}
    expected |= {f"{second}_{i}": "CANCELLED" if i == 1 else "COMPLETED" for i in range(4)}
    eventually(lambda: states(cluster, first, second), expected)


def test_sacct_tells_the_exit_code(cluster: Cluster) -> None:
    job = submit(cluster, "exit 7")
    eventually(lambda: run(cluster, "sacct", "-nPX", "-j", job, "-o", "State,ExitCode").strip(), "FAILED|7:0")


def test_without_accounting_only_squeue_knows(cluster_without_accounting: Cluster) -> None:
    job = submit(cluster_without_accounting, "exit 7")
    eventually(lambda: states(cluster_without_accounting, job), {job: "FAILED"})
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        run(cluster_without_accounting, "sacct")
    assert "accounting storage is disabled" in refusal.value.stderr


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_power_cut_takes_the_jobs_along(short_folder: Path, needs_slurm: None, namespaces: bool) -> None:
    cluster = Cluster(short_folder / "c", num_nodes=2, accounting=False)
    if namespaces and not cluster.namespaces:
        pytest.skip("only root can give nodes namespaces")
    cluster.namespaces = namespaces
    with cluster:
        node = cluster.node_names[1]
        (short_folder / "sleeper").symlink_to("/bin/sleep")
        sleeper = f"{short_folder}/sleeper"
        submit(cluster, f"setsid {sleeper} 301 & {sleeper} 302", "-w", node)
        running = [f"{sleeper} 301 ", f"{sleeper} 302 "]
        eventually(lambda: sorted(words for words in processes_of(Path(sleeper)) if words.startswith(sleeper)), running)
        cluster.power_cut(1)
        assert processes_of(Path(sleeper)) == []
        with pytest.raises(ClusterError, match="is off already"):
            cluster.power_cut(1)
        cluster.start_slurmd(1)
        assert run(cluster, "srun", "--immediate=30", "-w", node, "printenv", "SLURMD_NODENAME").strip() == node
        with pytest.raises(ClusterError, match="is running"):
            cluster.start_slurmd(1)


@pytest.mark.parametrize("accounting", [True, False])
def test_kill_9_of_the_owner_leaves_nothing(short_folder: Path, needs_slurm: None, accounting: bool) -> None:
    root = short_folder / "c"
    option = "--accounting" if accounting else "--no-accounting"
    server = subprocess.Popen([*PROGRAM, "serve", str(root), option], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == f"export SLURM_CONF={root}/etc/slurm.conf\n"
    environment = os.environ | {"SLURM_CONF": f"{root}/etc/slurm.conf"}
    subprocess.run(["sbatch", "-o/dev/null", "--wrap", "sleep 300"], env=environment, check=True, capture_output=True)
    eventually(lambda: any("sleep 300" in words for words in processes_of(root)), True)
    server.kill()
    server.wait()
    eventually(lambda: processes_of(root), [], seconds=10)
    eventually(root.exists, False, seconds=10)


def test_stop_leaves_no_process_and_no_folder(short_folder: Path, needs_slurm: None) -> None:
    cluster = Cluster(short_folder / "c", accounting=False).up()
    with pytest.raises(ClusterError, match="is up already"):
        cluster.up()
    submit(cluster, "sleep 300", "--nodes=4")
    eventually(lambda: any("sleep 300" in words for words in processes_of(cluster.root)), True)
    cluster.stop()
    assert processes_of(cluster.root) == []
    assert list(short_folder.iterdir()) == []
    cluster.stop()  # once more is harmless
    with cluster:  # and it can be had again
        assert len(run(cluster, "srun", "-N4", "hostname").split()) == 4


def test_two_clusters_do_not_meet(cluster: Cluster, cluster_without_accounting: Cluster) -> None:
    here, there = cluster, cluster_without_accounting
    assert here.slot_index != there.slot_index
    job = submit(here, "sleep 60", "--job-name=mine")
    eventually(lambda: states(here, job), {job: "RUNNING"})
    assert run(there, "squeue", "-h") == ""
    run(here, "scancel", job)
    assert len(run(there, "srun", "-N4", "hostname").split()) == 4


def test_the_command_line_from_up_to_down(short_folder: Path, needs_slurm: None) -> None:
    root = str(short_folder / "c")

    def program(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout, done.stderr

    sizes = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-node=3", "--no-accounting"]
    assert program("up", root, *sizes) == (0, f"export SLURM_CONF={root}/etc/slurm.conf\n", "")
    assert program("shell", root, "--", "sinfo", "-h", "-p", "main", "-o", "%D %c %G %t") == (0, "2 3 gpu:1 idle\n", "")
    assert "high" in program("status", root)[1]
    code, _, error = program("up", root)
    assert (code, "a cluster is up here" in error) == (1, True)
    assert program("down", root) == (0, "", "")
    assert list(short_folder.iterdir()) == []
    code, _, error = program("down", root)
    assert (code, "no cluster is up here" in error) == (1, True)


def test_the_longest_folder_works_and_one_more_is_refused(short_folder: Path, needs_slurm: None) -> None:
    def deep(num_characters: int) -> Cluster:
        return Cluster(short_folder / ("x" * (num_characters - len(str(short_folder)) - 1)), num_nodes=1, accounting=False)

    with pytest.raises(ClusterError, match=r"too long by \d+ characters") as refusal, deep(100):
        pass
    found = re.search(r"by (\d+)", str(refusal.value))
    assert found is not None
    longest = 100 - int(found[1])
    with deep(longest) as cluster:
        assert run(cluster, "srun", "echo", "ok") == "ok\n"
    with pytest.raises(ClusterError, match="too long by 1 characters"), deep(longest + 1):
        pass
    assert list(short_folder.iterdir()) == []


def test_a_folder_with_other_things_is_neither_used_nor_deleted(short_folder: Path, needs_slurm: None) -> None:
    (short_folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ClusterError, match="is not empty"), Cluster(short_folder):
        pass
    assert (short_folder / "thesis.tex").read_text() == "years of work"


def test_missing_packages_are_named(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(short_folder))  # the daemons are found all the same, in /usr/sbin
    with pytest.raises(ClusterError, match=r"missing: .*sinfo, srun.*; install .*\$\(cat slurm/apt.txt\)"):
        Cluster(short_folder / "c").up()


def test_sigterm_ends_serve_and_all_it_started(short_folder: Path, needs_slurm: None) -> None:
    root = short_folder / "c"
    server = subprocess.Popen([*PROGRAM, "serve", str(root), "--no-accounting"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=20) == 0
    assert processes_of(root) == []
    assert list(short_folder.iterdir()) == []
