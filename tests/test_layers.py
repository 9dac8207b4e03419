"""Claims about who may import whom, and about the shape of every function; read off the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, run_python

# each line may import only lines above it, and its own package
LAYERS = (
    ("records", "atomic", "version", "prompts", "leases", "listing", "watch", "preflight_report"),
    ("config", "effort", "manifest", "references"),
    ("testsets",),
    ("answers", "delivery", "hdf5", "mp4", "score_dir"),
    ("run_dir",),
    ("takes",),
    ("table",),
    ("report_page",),
    ("package_settings", "package_reading", "package_zip", "package_manifest", "export_sample"),
    ("package_look", "export_formats"),
    ("package", "report", "verify", "export"),
    ("xdit",),
    ("parallel",),
    ("models",),
    ("metrics",),
    ("stages",),
    ("position_file", "work", "preflight"),
    ("first_frames",),
    ("claims",),
    ("score_shard", "video_shard"),
    ("run",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = {"answers", "atomic", "delivery", "hdf5", "leases", "listing", "mp4", "run_dir", "score_dir"} | {
    "export",
    "export_formats",
    "export_sample",
    "package",
    "package_look",
    "package_reading",
    "package_zip",
    "report",
    "verify",
    "table",
    "takes",
    "testsets",
    "manifest",
}
MAX_LINES, MAX_PARAMETERS = 40, 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> dict[str, ast.Module]:
    """path from the root -> syntax tree, of every Python file in the folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports(path: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(full name, line) of everything imported, inside functions too."""
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            yield from ((".".join([*filter(None, base), alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "import_module",
            "__import__",
            "find_spec",
        }:
            yield from ((arg.value, node.lineno) for arg in node.args if isinstance(arg, ast.Constant))


def layer(module: str) -> str:
    """The name in LAYERS of a module of ipt2v, "" for ipt2v itself."""
    return ([*module.split("."), ""])[1]


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> list[ast.arg]:
    """The parameters that a caller gives."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [one for one in (*named, arguments.vararg, arguments.kwarg) if one is not None and one.arg not in ("self", "cls")]


def is_command(function: Function) -> bool:
    """Whether the parameters are the options of a command line."""
    return any(".command(" in ast.unparse(decorator) for decorator in function.decorator_list)


def writes_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        changes = ("update", "setdefault", "pop", "clear", "popitem", "__setitem__", "__delitem__")
        return name in {f"os.environ.{change}" for change in changes} | {"os.putenv", "os.unsetenv"}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    return any("os.environ" in ast.unparse(target) for target in targets)


LIBRARY = sources("ipt2v")
ALL = LIBRARY | sources("launch", "slurm")


def test_every_module_of_the_library_has_a_layer() -> None:
    modules = {Path(path).parts[1].removesuffix(".py") for path in LIBRARY} - {"__init__"}
    assert modules == set(LEVEL)


def test_a_module_imports_only_layers_above_its_own() -> None:
    upward = []
    for path, tree in LIBRARY.items():
        mine = Path(path).parts[1].removesuffix(".py")
        for name, line in imports(path, tree):
            other = layer(name)
            if name.startswith("ipt2v.") and other != mine and LEVEL[other] >= LEVEL[mine]:
                upward.append(f"{path}:{line} imports {name}")
    assert upward == []


def test_only_run_knows_both_models_and_files() -> None:
    strangers = [
        f"{path}:{line} imports {name}"
        for path, tree in LIBRARY.items()
        if path.startswith(("ipt2v/models/", "ipt2v/stages/"))
        for name, line in imports(path, tree)
        if name.startswith("ipt2v.") and layer(name) in FILES
    ]
    assert strangers == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("launch", "launch/"),
        ("submitit", "launch/"),
        ("xfuser", "ipt2v/xdit.py"),
        ("typer", "launch/"),
        ("webdataset", "ipt2v/export_formats.py"),
        ("pyarrow", "ipt2v/export_formats.py"),
        ("deepspeed", "ipt2v/models/deepspeed_start.py"),
    ],
)
def test_a_package_is_imported_in_its_own_place_only(package: str, allowed: str) -> None:
    strangers = [
        f"{path}:{line} imports {name}"
        for path, tree in ALL.items()
        if not path.startswith(allowed)
        for name, line in imports(path, tree)
        if name.split(".")[0] == package
    ]
    assert strangers == []


def test_the_library_never_writes_the_environment_but_for_deepspeed() -> None:
    # DeepSpeed reads LOCAL_RANK and nothing else: it is set as long as it is needed, and put back
    files = {path: tree for path, tree in LIBRARY.items() if path != "ipt2v/models/deepspeed_start.py"}
    writes = [f"{path}:{node.lineno}" for path, tree in files.items() for node in ast.walk(tree) if writes_environment(node)]
    assert writes == []


@pytest.mark.parametrize(
    "code",
    ["os.environ['A'] = 'b'", "del os.environ['A']", "os.environ.update(A='b')", "os.environ |= {}", "os.putenv('A', 'b')"],
)
def test_the_search_for_writes_finds_each_kind(code: str) -> None:
    assert any(writes_environment(node) for node in ast.walk(ast.parse(code)))


def test_no_function_is_longer_than_forty_lines() -> None:
    lengths = {
        f"{path}:{one.lineno} {one.name}": (one.end_lineno or 0) - one.lineno + 1
        for path, tree in ALL.items()
        for one in functions(tree)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_takes_more_than_six_parameters() -> None:
    counts = {
        f"{path}:{one.lineno} {one.name}": len(parameters(one))
        for path, tree in ALL.items()
        for one in functions(tree)
        if not (path == "launch/cli.py" and is_command(one))
    }
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_every_signature_is_typed() -> None:
    untyped = [
        f"{path}:{one.lineno} {one.name}"
        for path, tree in ALL.items()
        for one in functions(tree)
        if one.returns is None or any(parameter.annotation is None for parameter in parameters(one))
    ]
    assert untyped == []


BEFORE_A_JOB = (
    *("ipt2v.records", "ipt2v.config", "ipt2v.run_dir", "ipt2v.package", "ipt2v.report", "ipt2v.models.catalogue"),
    "ipt2v.models.vace.memory",
    *(
        "launch.cli",
        "launch.cost",
        "launch.cost_table",
        "launch.plan",
        "launch.preflight",
        "launch.freeze",
        "launch.progress",
        "launch.queue",
        "launch.submit",
        "launch.demo",
    ),
)


def test_what_runs_before_a_job_imports_no_torch() -> None:
    found = run_python(
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, sorted({'torch', 'diffusers', 'transformers', 'xfuser'} & sys.modules.keys()))",
        *BEFORE_A_JOB,
    )
    assert found.splitlines() == [f"{name} []" for name in BEFORE_A_JOB]
