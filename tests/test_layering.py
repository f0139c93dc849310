"""What holds for the code as a whole: who may import whom, sizes, names, presets, travelling errors, a quick --help."""

import ast
import importlib
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config import Config, load_config
from flows.presets import PRESETS

ROOT = Path(__file__).parents[1]
FOLDERS = ("components", "cluster", "flows")
MUST_NOT_IMPORT = {
    "components": {"ray", "deepspeed", "mlflow", "boto3", "flows", "cluster"},
    "cluster": {"components", "flows"},
    "flows": {"ray", "deepspeed", "mlflow", "boto3"},
}
MUST_STAY_LIGHT = (
    "flows/__main__.py",
    "flows/config.py",
    "flows/presets.py",
    "flows/command.py",
    "flows/console.py",
    "components/recipe.py",
    "components/search_space.py",
    "components/errors.py",
    "cluster/errors.py",
    "cluster/placement.py",
    "cluster/artifacts.py",
)
HEAVY = {"torch", "ray", "mlflow", "diffusers", "transformers", "deepspeed", "numpy", "scipy", "matplotlib", "pyarrow"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "manager"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LOOP_LINES = 300, 80, 120
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
READABLE = [*SOURCES, *sorted((ROOT / "benchmarks").glob("*.py"))]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module, also those imported inside functions and by name through importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield node.module or ""
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_is_code_to_look_at() -> None:
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_keep_to_the_table(path: Path) -> None:
    forbidden = MUST_NOT_IMPORT[named(path).split("/")[0]]
    roots = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert roots & forbidden == set()


def test_light_files_import_nothing_heavy_when_they_are_imported() -> None:
    for name in MUST_STAY_LIGHT:
        tree = ast.parse((ROOT / name).read_text())
        bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {node for body in bodies for node in ast.walk(body)}
        outer = [node for node in ast.walk(tree) if node not in inside]
        roots = {module.split(".")[0] for node in outer for module in imported_by(node)}
        assert roots & HEAVY == set(), name


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("path", READABLE, ids=named)
def test_files_have_a_subject_a_docstring_and_a_size_to_read(path: Path) -> None:
    parts = set(path.relative_to(ROOT).with_suffix("").parts) | set(path.stem.split("_"))
    assert parts & FORBIDDEN_NAMES == set()
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", READABLE, ids=named)
def test_functions_are_short(path: Path) -> None:
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        limit = MAX_LOOP_LINES if function.name == "train_worker" else MAX_FUNCTION_LINES
        assert lines <= limit, f"{function.name} has {lines} lines"


def test_presets_are_complete_configs_that_read_back() -> None:
    for name, preset in PRESETS.items():
        config = load_config(preset=name)
        assert config == preset()
        assert Config.model_validate(json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("verb", ["prepare", "train", "tune"])
def test_every_preset_dry_runs(name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(preset=name, workspace=str(tmp_path / "workspace"))
    steps = importlib.import_module(f"flows.{verb}").plan(config)
    assert steps and all(isinstance(step, str) and step for step in steps)
    assert list(tmp_path.iterdir()) == [], "a plan touches nothing"


def exceptions() -> Iterator[tuple[str, str]]:
    """Yield (module, class) of every exception of the code."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.ClassDef) and any(base.endswith(("Error", "Exception")) for base in bases):
                yield named(path).removesuffix(".py").replace("/", "."), node.name


@pytest.mark.parametrize(("module", "name"), list(exceptions()))
def test_every_exception_survives_pickling(module: str, name: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    error = kind("expected a, found b; do c")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) == "expected a, found b; do c"
    assert vars(copy) == vars(error)
    if module.endswith(".errors"):
        assert kind.exit_code in (1, 2)


HELP = """
import runpy, sys
sys.argv = ["fresco", *sys.argv[1:]]
try:
    runpy.run_module("flows", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
print("LOADED", *sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_answers_without_torch_or_ray_in_under_a_second(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", HELP, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    spent_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    loaded = set(done.stderr.rpartition("LOADED ")[2].split())
    assert "typer" in loaded and loaded & (HEAVY | {"fastapi", "boto3", "PIL"}) == set()
    # CPU time of that process, so that other work on the machine does not count.
    assert spent_s < 1.0
