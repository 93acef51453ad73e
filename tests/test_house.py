"""The house: imports point one way, folders of files stay folders of files, importing is quick, docstrings name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What each part of llama/ may import, by the part's first name; a part may always import itself. A part stands below
# all that may import it, so that no two can import each other.
BASE = {"errors", "env", "config"}
MODEL = BASE | {"rope", "ops", "attention", "cache", "kernels", "parallel", "device", "noise"}
CHECKPOINT = MODEL | {"sizes", "model", "copies", "offload", "quantization"}
TEXT = {"errors", "tokenizer", "chat", "data"}
ALLOWED = {
    "errors": set(),
    "env": {"errors"},
    "sizes": {"errors"},
    "config": {"errors", "env"},
    "noise": set(),
    "device": {"env", "errors"},
    "kernels": {"errors", "env"},
    "parallel": BASE | {"kernels", "device"},
    "rope": {"config"},
    "ops": {"kernels"},
    "attention": set(),
    "cache": {"attention"},
    "model": MODEL,
    "copies": {"errors"},
    "offload": {"errors", "copies", "model"},
    "quantization": MODEL | {"model"},
    "tokenizer": {"errors"},
    "chat": {"errors", "tokenizer"},
    "data": {"errors", "env", "tokenizer", "chat"},
    # Of texts only what a checkpoint carries along: its tokenizer.
    "checkpoint": CHECKPOINT | {"tokenizer"},
    "plan": CHECKPOINT | {"checkpoint"},
    "export": CHECKPOINT | {"checkpoint", "tokenizer", "chat"},
    "adapters": CHECKPOINT | {"checkpoint"},
    "runtime": CHECKPOINT | {"checkpoint", "plan", "tokenizer"},
    "flags": set(),
    "generation": CHECKPOINT | TEXT | {"checkpoint", "plan", "adapters", "runtime"},
    "finetuning": CHECKPOINT | TEXT | {"checkpoint", "plan", "adapters", "runtime"},
    "cli": BASE | {"parallel", "flags"},
    "download": {"errors", "sizes", "config", "cli"},
}
ALLOWED["commands"] = set(ALLOWED)  # they stand on everything


def modules(root: Path) -> list[Path]:
    """All but the files that Python runs for `-m`: they start commands."""
    return [path for path in sorted((root / "llama").rglob("*.py")) if path.name != "__main__.py"]


def part_of(path: Path, root: Path) -> str:
    return path.relative_to(root / "llama").parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" if node.module == "llama" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name and name.startswith("llama.")}
        assert not any(name and name.split(".")[0] in {"scripts", "example"} for name in names), path
    return parts


def test_imports_point_one_way(root: Path) -> None:
    for path in modules(root):
        part = part_of(path, root)
        if part == "__init__":
            continue
        strangers = imported_parts(path) - ALLOWED[part] - {part}
        assert not strangers, f"{path.relative_to(root)} imports {strangers}"


def test_the_rule_has_no_circle() -> None:
    below: set[str] = set()
    for part, others in ALLOWED.items():
        assert others <= below, f"{part} may import {others - below}, which stand above it"
        below.add(part)


def test_the_rule_knows_every_part(root: Path) -> None:
    assert {part_of(path, root) for path in modules(root)} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("name", ["ckpts", "datasets"])
def test_folders_of_files_hold_no_code(root: Path, name: str) -> None:
    assert not list((root / name).rglob("*.py"))


def in_fresh_python(root: Path, code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
def test_datasets_is_hugging_faces_package(root: Path) -> None:
    assert in_fresh_python(root, "import datasets; print(datasets.load_dataset.__module__)") == "datasets.load"


@pytest.mark.slow
def test_importing_llama_pulls_in_no_heavy_package(root: Path) -> None:
    heavy = "{'transformers', 'peft', 'datasets', 'fairscale', 'sympy', 'matplotlib', 'huggingface_hub'}"
    assert in_fresh_python(root, f"import sys, llama; print({heavy} & set(sys.modules) or 'none')") == "none"


@pytest.mark.slow
def test_threads_wait_briefly_unless_a_person_says_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import llama, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert in_fresh_python(root, code) == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert in_fresh_python(root, code) == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert in_fresh_python(root, code) == "None"


@pytest.mark.slow
def test_the_environment_is_settled_before_torch_is_loaded(root: Path) -> None:
    before = (root / "llama" / "__init__.py").read_text().partition("env.wait_briefly()")[0]
    assert [line for line in before.splitlines() if line.startswith(("import", "from"))] == ["from llama import env"]
    code = "import ast, sys; sys.modules['llama'] = type(sys)('llama'); sys.modules['llama'].__path__ = ['llama']; "
    assert in_fresh_python(root, code + "import llama.env; print('torch' in sys.modules)") == "False"


def test_entry_points_are_short(root: Path) -> None:
    for path in root.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every docstring of a file: module, classes, functions and methods."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), text) for node in nodes if (text := ast.get_docstring(node)) is not None]


def test_docstrings_say_it_rather_than_ask(root: Path) -> None:
    paths = [*root.glob("*.py"), *(root / "llama").rglob("*.py"), *(root / "scripts").rglob("*.py")]
    found = [(path, line, text) for path in sorted(paths) for line, text in docstrings(path)]
    assert len(found) > 1000  # the walk finds them
    refused = [
        f"{path.relative_to(root)}:{line}: {text.splitlines()[0]}"
        for path, line, text in found
        if re.match(r"(what|how|whether)\b", text.lstrip("\"'`*_ "), flags=re.IGNORECASE)
    ]
    assert not refused, "begin with a verb or with what it is (see CONTRIBUTING.md):\n" + "\n".join(refused)


def test_pins_and_ranges_agree(root: Path) -> None:
    import tomllib

    from packaging.requirements import Requirement

    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    pins = {Requirement(line).name: Requirement(line) for line in lines if line}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "llama-cpp-python":  # built where the export is proven: .ci/run pins it
            continue
        version = str(pins[requirement.name].specifier).removeprefix("==")
        assert version in requirement.specifier, requirement
