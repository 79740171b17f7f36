"""What readers copy has to run: examples, Python blocks of the pages, docstring examples, README's
commands, the formulas.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/when_to_use.md",
    "docs/long_inputs.md",
    "docs/serving.md",
    "docs/socket.md",
    "docs/torch.md",
    "docs/jax.md",
]
EXAMPLES = {  # arguments that make them small, and a text that they must print
    "quickstart.py": (["--tokens", "3000"], "a state that does not grow"),
    "gradient_check.py": (["--tokens", "40"], "worst relative error"),
    "merge_states.py": (["--tokens", "3000"], "merged in the other order"),
    "dlpack.py": (["--tokens", "500"], "torch bfloat16"),
    "jax_training.py": (["--quick"], "right on fresh sequences"),
    "sparse_decoding.py": (["--tokens", "3000"], "tokens selected by each of 8 heads"),
}
TRAIN = {
    "character_model.py",
    "pixel_digits.py",
    "convert_model.py",
}  # in PyTorch: see test_examples_torch.py
MEASURE = {"socket_study.py", "long_cache.py"}  # see test_socket_study.py and test_long_cache.py
SHARED = {
    "data_sets.py",
    "layers.py",
    "pictures.py",
    "socket_data.py",
    "socket_methods.py",
    "socket_pictures.py",
    "socket_real.py",
    "socket_tables.py",
}  # imported by those above
NEEDS = {  # packages beyond those of the tests
    "jax_training.py": "jax",
    "docs/jax.md": "jax",
    ".adapters.jax": "jax",
    "docs/torch.md": "torch",
    ".adapters.torch": "torch",
    ".adapters.torch.module": "torch",
    ".adapters.torch.cache": "torch",
}
MODULES = [
    "",
    ".race_attention",
    ".soft_lsh",
    ".state",
    ".runtime.threads",
    ".exact",
    ".sparse",
    ".sparse.decode",
    ".adapters.jax",
    ".adapters.torch",
    ".adapters.torch.module",
    ".adapters.torch.cache",
]


def skip_without_what_it_needs(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(
            NEEDS[name], reason=f"{NEEDS[name]} is not installed, which {name} needs"
        )


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page, dedented; those marked `notest` are left out."""
    text = (ROOT / page).read_text()
    found = re.finditer(
        rf"^( *)```{language}([^\n]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(match[3]) for match in found if "notest" not in match[2]]


def run_script(path: pathlib.Path, *arguments: str) -> str:
    """Run a script in a new process with warnings as errors; return what it prints."""
    command = [sys.executable, "-W", "error", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_their_order(page, tmp_path, monkeypatch):
    skip_without_what_it_needs(page)
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    names: dict[str, object] = {}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.process
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    skip_without_what_it_needs(name)
    arguments, expected = EXAMPLES[name]
    assert expected in run_script(ROOT / "examples" / name, *arguments)


def test_every_example_is_run_and_short():
    paths = sorted((ROOT / "examples").glob("*.py"))
    assert {path.name for path in paths} == set(EXAMPLES) | TRAIN | MEASURE | SHARED
    for path in paths:
        # Statements, not lines: independent of the formatter. The larger examples have a model, its
        # data, its training and a picture, or tables.
        most = 60 if path.name in EXAMPLES.keys() - NEEDS.keys() else 150
        statements = sum(
            isinstance(node, ast.stmt) for node in ast.walk(ast.parse(path.read_text()))
        )
        assert statements <= most, path.name


@pytest.mark.process
def test_every_formula_holds():
    printed = run_script(ROOT / "docs" / "check_math.py").splitlines()
    assert float(printed[-1].removeprefix("worst relative error: ")) <= 1e-12
    assert len(printed) > 40


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    skip_without_what_it_needs(name)
    module = importlib.import_module(f"racecore{name}")
    assert doctest.testmod(module, verbose=False).failed == 0


def test_readme_begins_with_two_commands_of_one_line():
    commands = blocks("README.md", "sh")[:2]
    assert [command.count("\n") for command in commands] == [1, 1]
    demo, tests = (shlex.split(command) for command in commands)
    assert demo[:4] == tests[:4] == ["python3", "-m", "venv", ".venv"]
    assert demo[-2:] == [".venv/bin/racecore", "demo"]
    assert tests[tests.index(".venv/bin/python") :][:3] == [".venv/bin/python", "-m", "pytest"]


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_public_name_is_in_the_api_page():
    import racecore

    text = (ROOT / "docs" / "api.rst").read_text()
    for name in racecore.__all__:
        assert name == "__version__" or name in text, name
