"""Claims about preflight: a bad node is named, whatever is wrong with it, and a good one is not."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, demo_config, write_fake_weights
from hypothesis import given
from hypothesis import strategies as st
from main_job import BIN, call, ipt2v

from ipt2v.atomic import write_text
from ipt2v.preflight import _await_files, _peers, host_path, matmul, weights_seen
from ipt2v.preflight_report import Finding, Host, Rank, Report, dump, judge, load_report
from launch.cluster import Cluster
from launch.preflight import deaths, prepare, read, summary, table, verdict
from launch.queue import Submitted, remember
from slurm.devcluster import Cluster as DevCluster

NUM_NODES, PER_NODE = 4, 2
NODES = [f"n{number}" for number in range(NUM_NODES)]


def host(rank: int) -> Host:
    is_first = rank % PER_NODE == 0
    return Host(
        element=0,
        rank=rank,
        local_rank=rank % PER_NODE,
        node=NODES[rank // PER_NODE],
        host="h",
        gpus_asked=PER_NODE,
        versions={"python": "3.11", "torch": "2.6", "cuda": "12.4", "driver": "550.54"},
        free_gb={"runs_dir": 900.0, "/dev/shm": 60.0},
        folder_problems={},
        weights_bytes={"vace/a.safetensors": 7, "vace/b.safetensors": 8} if is_first else {},
        weights_gb=1.5e-8,
        read_gb_per_s=2.0 if is_first else 0.0,
    )


def rank(number: int) -> Rank:
    node = NODES[number // PER_NODE]
    return Rank(
        element=0,
        rank=number,
        node=node,
        num_nodes=NUM_NODES,
        device="cuda",
        kind="H100",
        gpu_id=f"GPU-{number}",
        total_gb=80.0,
        free_gb=79.4,
        tflops=600.0 + number,
        node_gb_per_s=200.0,
        all_gb_per_s=40.0,
        pairs={other: 45.0 for other in NODES if other != node},
        clock=1000.0,
        visible_seconds=0.3,
        has_link=number == 3,
        has_lock=number == 0,
    )


ALL = range(NUM_NODES * PER_NODE)
GOOD = Report(hosts=tuple(map(host, ALL)), ranks=tuple(map(rank, ALL)))


def with_hosts(node: str, **change: object) -> Report:
    """GOOD, but for what the hosts of a node say."""
    hosts = tuple(replace(one, **change) if one.node == node else one for one in GOOD.hosts)  # type: ignore[arg-type]
    return replace(GOOD, hosts=hosts)


def with_ranks(where: str | int, **change: object) -> Report:
    """GOOD, but for what the ranks of a node, or one rank, measure."""
    ranks = tuple(replace(one, **change) if where in (one.node, one.rank) else one for one in GOOD.ranks)  # type: ignore[arg-type]
    return replace(GOOD, ranks=ranks)


def only(report: Report) -> Finding:
    (finding,) = judge(report)
    return finding


def test_good_nodes_give_no_finding() -> None:
    assert judge(GOOD) == ()
    assert verdict((), Cluster()) == ["all good"]


def test_a_report_is_the_same_after_it_was_written_and_read() -> None:
    report = with_ranks("n1", visible_seconds=math.inf, unseen=(0, 1))
    assert load_report(dump(report)) == report


SICK_HOSTS = [
    ({"versions": {"python": "3.11", "torch": "2.5", "cuda": "12.4", "driver": "550.54"}}, "torch", "2.5"),
    ({"missing_commands": ("scontrol",)}, "scontrol", "none on PATH"),
    ({"weights_problems": ("video.model: weights file a is missing",)}, "weights", "1 files missing or damaged"),
    ({"weights_bytes": {"vace/a.safetensors": 7}}, "size of vace/b.safetensors", "0 bytes"),
]


@pytest.mark.parametrize(("change", "check", "found"), SICK_HOSTS)
def test_a_node_that_sees_something_else_is_named(change: dict[str, object], check: str, found: str) -> None:
    finding = only(with_hosts("n2", **change))
    assert (finding.node, finding.check, finding.exclude, finding.is_problem) == ("n2", check, ("n2",), True)
    assert found in finding.found


SICK_RANKS = [
    ({"wrong_rows": 3}, "matmul", "3 wrong rows (rank 5, GPU-5)"),
    ({"tflops": 300.0}, "matmul", "300 TFLOP/s (rank 5)"),
    ({"free_gb": 20.0}, "GPU memory", "60.0 of 80 GB in use"),
    ({"total_gb": 40.0, "free_gb": 39.5}, "GPU memory", "40 GB in all"),
]


@pytest.mark.parametrize(("change", "check", "found"), SICK_RANKS)
def test_a_sick_gpu_is_named_with_its_rank(change: dict[str, object], check: str, found: str) -> None:
    finding = only(with_ranks(5, **change))
    assert (finding.node, finding.check, finding.exclude) == ("n2", check, ("n2",))
    assert found in finding.found and "5" in finding.found


def test_a_node_that_is_slow_with_everybody_is_named_and_not_its_partners() -> None:
    slow = {("n1", other) for other in NODES} | {(other, "n1") for other in NODES}
    ranks = tuple(
        replace(one, pairs={other: 9.0 if (one.node, other) in slow else 45.0 for other in one.pairs}) for one in GOOD.ranks
    )
    finding = only(replace(GOOD, ranks=ranks))
    assert (finding.node, finding.exclude) == ("n1", ("n1",)) and "9 GB/s" in finding.found


def test_a_node_that_is_slow_inside_is_named() -> None:
    finding = only(with_ranks("n3", node_gb_per_s=30.0))
    assert (finding.node, finding.check, finding.exclude) == ("n3", "all-to-all inside the node", ("n3",))


def test_wrong_values_are_blamed_on_the_node_that_all_of_them_went_through() -> None:
    ranks = tuple(replace(one, wrong_from=(4,)) if one.rank in (0, 7) else one for one in GOOD.ranks)
    finding = only(replace(GOOD, ranks=ranks))
    assert (finding.node, finding.check, finding.exclude) == ("n2", "all-to-all", ("n2",))


def test_a_node_that_does_not_see_the_others_files_is_named() -> None:
    def unseen(one: Rank) -> tuple[int, ...]:
        return tuple(other for other in ALL if (one.node == "n1") != (NODES[other // PER_NODE] == "n1"))

    ranks = tuple(replace(one, unseen=unseen(one), visible_seconds=math.inf) for one in GOOD.ranks)
    finding = only(replace(GOOD, ranks=ranks))
    assert (finding.node, finding.check, finding.exclude) == ("n1", "shared files", ("n1",))


def test_a_skewed_clock_is_a_warning_that_names_its_node() -> None:
    finding = only(with_ranks("n3", clock=1042.0))
    assert (finding.node, finding.check, finding.is_problem, finding.exclude) == ("n3", "clock", False, ())
    assert finding.found.startswith("+42 s")


def test_two_holders_of_one_lease_are_a_problem_of_the_file_system_and_of_no_node() -> None:
    finding = only(with_ranks(5, has_link=True))
    assert (finding.node, finding.exclude, finding.is_problem) == ("", (), True) and "2 ranks" in finding.found


def test_a_command_that_is_missing_everywhere_is_a_warning_that_says_what_is_lost() -> None:
    hosts = tuple(replace(one, missing_commands=("scontrol",)) for one in GOOD.hosts)
    finding = only(replace(GOOD, hosts=hosts))
    assert not finding.is_problem and "submit again by hand" in finding.todo


def test_weights_that_are_missing_everywhere_are_no_nodes_fault() -> None:
    hosts = tuple(replace(one, weights_problems=("a is missing",)) for one in GOOD.hosts)
    finding = only(replace(GOOD, hosts=hosts))
    assert (finding.node, finding.is_problem, finding.exclude) == ("all nodes", True, ())


def test_of_two_nodes_that_differ_neither_is_excluded() -> None:
    hosts = [replace(one, versions={"torch": "2.5"} if one.node == "n0" else {"torch": "2.6"}) for one in GOOD.hosts[:4]]
    finding = only(Report(hosts=tuple(hosts)))
    assert (finding.node, finding.exclude) == ("n0, n1", ()) and "2.5 on n0" in finding.found


def test_a_full_disk_is_a_problem_and_a_small_one_for_copies_of_weights_is_not() -> None:
    full = with_hosts("n0", free_gb={"runs_dir": 1.0})
    assert [(one.check, one.is_problem, one.exclude) for one in judge(full)] == [("runs_dir", True, ())]
    small = with_hosts("n0", free_gb={"local_weights_dir": 10.0}, weights_gb=75.0)
    assert [(one.check, one.node, one.is_problem) for one in judge(small)] == [("local_weights_dir", "n0", False)]


def test_two_ranks_on_one_gpu_are_told_as_such_and_not_as_strangers_in_its_memory() -> None:
    report = with_ranks(5, gpu_id="GPU-4", free_gb=70.0)
    assert {one.check for one in judge(report)} == {"GPUs"}


def test_the_line_for_the_cluster_file_keeps_what_it_excludes_already() -> None:
    site = Cluster.model_validate({"video": {"exclude": "old[1-2]"}})
    lines = verdict(judge(with_ranks(5, wrong_rows=1)), site)
    assert lines[-1] == "  exclude: old[1-2],n2"
    assert lines[0].startswith("problem: n2: matmul: found 1 wrong rows")


def test_the_table_has_a_line_for_each_node_with_the_worst_of_its_ranks() -> None:
    header, *rows = table(with_ranks(5, tflops=300.0))
    assert [row.split()[:2] for row in rows] == [["n0", "0-1"], ["n1", "2-3"], ["n2", "4-5"], ["n3", "6-7"]]
    assert " 300 " in rows[2] and "TFLOP/s" in header
    assert any(line.startswith("the same on all ranks: python 3.11, torch 2.6") for line in summary(GOOD))


def test_who_never_came_is_blamed_and_not_who_waited_in_vain(tmp_path: Path) -> None:
    here = prepare(Cluster(), config=None, runs_dir=tmp_path, weights_dir=tmp_path, num_elements=1, on_slurm=False)
    preflight = replace(here, site=Cluster.model_validate({"video": {"nodes": NUM_NODES, "gpus_per_node": PER_NODE}}))
    remember(preflight.run, Submitted(place="local", stage="video", job_id="99999999", shards=(0,), after=None))
    came = tuple(one for one in GOOD.hosts if one.rank != 5)
    for one in came:
        write_text(host_path(preflight.run.root, 0, one.rank), dump(one))
    log = preflight.run.jobs_path("video") / "99999999_0_log.err"
    log.write_text('Timeout (0:02:00)!\n  File "torch/distributed/x.py", line 1 in barrier\n', encoding="utf-8")
    report = read(preflight)
    assert report.hosts == came
    (finding,) = deaths(preflight, report)
    assert (finding.node, finding.exclude) == ("n2", ("n2",))
    assert finding.found.startswith("hanging collective") and finding.found.endswith("ranks 5")


# --- measuring ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16))
def test_every_pair_of_nodes_meets_once_and_both_in_the_same_round(num_nodes: int) -> None:
    rounds = list(zip(*(tuple(_peers(node, num_nodes)) for node in range(num_nodes)), strict=True))
    met = [frozenset((node, peer)) for peers in rounds for node, peer in enumerate(peers) if peer >= 0]
    pairs = [frozenset(pair) for pair in combinations(range(num_nodes), 2)]
    assert sorted(map(sorted, met)) == sorted(sorted(pair) for pair in pairs for _ in range(2))
    assert all(peers[peer] == node for peers in rounds for node, peer in enumerate(peers) if peer >= 0)


def test_one_wrong_value_of_a_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.__matmul__

    def flawed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = real(left, right)
        if product.dtype == torch.float32:
            product[3, 5] += 1
        return product

    assert matmul(torch.device("cpu"))[1] == 0
    monkeypatch.setattr(torch.Tensor, "__matmul__", flawed)
    assert matmul(torch.device("cpu"))[1] == 2  # in the first and the last product


def test_a_file_that_never_comes_costs_no_longer_than_the_wait(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("0\n")
    (tmp_path / "half").write_text("0")
    seconds, missing = _await_files(tmp_path, ["a", "b", "half"], 0.2)
    assert missing == ["b", "half"] and 0.2 < seconds < 5


def test_weights_are_seen_with_their_sizes_and_what_is_missing_is_told(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    sizes, problems = weights_seen(write_fake_weights(tmp_path / "weights"), config)
    assert problems == () and sum(sizes.values()) > 0
    next((tmp_path / "weights").rglob("*.safetensors")).unlink()
    assert len(weights_seen(tmp_path / "weights", config)[1]) == 1


# --- as a user runs it --------------------------------------------------------------------------------------------------


def site_file(folder: Path, **site: object) -> Path:
    path = folder / "site.yaml"
    settings = {"runs_dir": str(folder / "runs"), "video": {"nodes": 2, "gpus_per_node": 2, "mem_gb": 2}}
    path.write_text(yaml.safe_dump(settings | site), encoding="utf-8")
    return path


@pytest.mark.slow
def test_two_ranks_of_this_machine_are_all_good(tmp_path: Path) -> None:
    weights = write_fake_weights(tmp_path / "weights")
    words = ("preflight", ROOT / "configs" / "demo.yaml", "video.fps=24", "--on", "local", "--weights", weights)
    output = ipt2v(*words, "--cluster", site_file(tmp_path, video={"tasks_per_node": 2}))
    assert "all good" in output and "weights: " in output
    (path,) = tmp_path.glob("runs/preflight-*/reports/000.json")
    report = load_report(path.read_text(encoding="utf-8"))
    assert [one.rank for one in report.ranks] == [0, 1]
    assert all(one.all_gb_per_s > 0 and one.tflops > 0 and one.visible_seconds < 60 for one in report.ranks)
    assert sum(one.has_link for one in report.ranks) == sum(one.has_lock for one in report.ranks) == 1


def test_what_cannot_be_looked_at_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    site = site_file(tmp_path)
    assert "this machine is one node" in ipt2v("preflight", "--on", "local", "--cluster", site, expect=2)
    assert "says nothing of nodes" in ipt2v("preflight", "--on", "here", "--cluster", site, expect=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.slurm
def test_good_nodes_of_a_cluster(cluster: DevCluster, tmp_path: Path) -> None:
    output = ipt2v("preflight", "--cluster", site_file(tmp_path), environment=cluster.environment)
    assert "problem" not in output and output.rstrip().endswith("all good but for the warnings")  # torch is a CPU build
    (path,) = tmp_path.glob("runs/preflight-*/reports/000.json")
    ranks = load_report(path.read_text(encoding="utf-8")).ranks
    assert [(one.rank, one.num_nodes, len(one.pairs)) for one in ranks] == [(number, 2, 1) for number in range(4)]
    assert len({one.node for one in ranks}) == 2 and sum(one.has_link for one in ranks) == 1


SICK = """
import os
if os.environ.get("SLURM_NODEID") == "1":
    os.environ["PATH"] = "/nowhere"  # what a broken image or module does to a node
if os.environ.get("SLURM_PROCID") == os.environ.get("DEADLY_RANK"):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    """A folder that makes the second node of each job sick."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SICK, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.slurm
def test_a_node_without_scontrol_is_named(cluster: DevCluster, tmp_path: Path, sick: Path) -> None:
    video = {"nodes": 2, "gpus_per_node": 1, "mem_gb": 2}
    site = site_file(tmp_path, setup=[f"export PYTHONPATH={sick}"], video=video)
    output = ipt2v("preflight", "--cluster", site, environment=cluster.environment, expect=1)
    (line,) = [line for line in output.splitlines() if line.startswith("problem")]
    name = line.split(": ")[1]
    assert name in cluster.node_names and f"{name}: scontrol: found none on PATH" in line
    assert output.splitlines()[-1] == f"  exclude: {name}"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_node_on_which_a_rank_dies_is_named(cluster: DevCluster, tmp_path: Path, sick: Path) -> None:
    site = site_file(tmp_path, setup=[f"export PYTHONPATH={sick} DEADLY_RANK=3"])
    output = ipt2v("preflight", "--cluster", site, environment=cluster.environment, expect=1)
    (line,) = [line for line in output.splitlines() if line.startswith("problem")]
    assert "element 0: found a rank died" in line and "Killed" in line
    assert output.splitlines()[-1] == f"  exclude: {line.split(': ')[1]}"


@pytest.mark.slow
@pytest.mark.slurm
def test_ctrl_c_leaves_nothing_in_the_queue(cluster: DevCluster, tmp_path: Path) -> None:
    words = [str(BIN / "ipt2v"), "preflight", "--cluster", str(site_file(tmp_path))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    driver = subprocess.Popen(words, env=os.environ | cluster.environment, **pipes)  # type: ignore[call-overload]
    while "job " not in driver.stdout.readline():
        assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]
    assert driver.returncode == 1 and "cancelled" in output and "Traceback" not in output
    live = call("squeue", "-h", "-t", "PENDING,RUNNING", "-o", "%j", environment=cluster.environment)
    assert "preflight" not in live
