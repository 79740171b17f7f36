"""The structure of the package, read from its sources: imports, sizes, signatures, names and prose.

Nothing is imported: every check reads syntax trees or lines, and all of them take a few seconds.
"""

from __future__ import annotations

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from functools import cache

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "racecore"
MOST_LINES = 400
MOST_COLUMNS = 100
MOST_ARGUMENTS = 10
LEAST_COMMENTS = 25  # lines per 1,000

# Public functions of more than MOST_ARGUMENTS: the contract of the package. All that they take
# beyond that number is keyword-only.
PUBLIC_CONTRACT = {
    "racecore.race_attention.attention",
    "racecore.race_attention.attention_forward",
    "racecore.sparse.decode.sparse_attention",
    "racecore.outofcore.driver.run",
    "racecore.adapters.torch.module.RaceAttention.__init__",
}
# An operator of PyTorch takes tensors, numbers and text, no bundles of them.
OPERATORS = {
    "racecore.adapters.torch.operator.attend_backward",
    "racecore.adapters.torch.operator._",
}
# Under this decorator a function writes LLVM code: its parameters are those of the generated one,
# and there is no array or bundle that could hold registers.
GENERATORS = {"intrinsic", "codegen"}
FRAMEWORKS = ("torch", "jax", "jaxlib", "transformers", "dask")

# What a layer may import of racecore besides itself; everything else is above it.
BELOW = {
    "racecore.runtime": ("racecore.errors", "racecore._version"),
    "racecore.ops": (
        "racecore.runtime",
        "racecore.chunking",
        "racecore.errors",
        "racecore.problem",
    ),
}


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module by its dotted name; a package has its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_bytes())
    return found


def path_of(module: str) -> pathlib.Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str) -> set[str]:
    """Return the dotted names that a module imports, at any level and for types only included.

    ``from racecore.state import checks`` imports the module `checks`; ``from racecore.state import
    RaceState`` imports the package, because there is no such module.
    """
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path_of(module).name == "__init__.py" else parent(module)
                for _ in range(node.level - 1):
                    package = parent(package)
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in modules() else base)
    return found


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def none_of(wrong: list[str]) -> None:
    assert not wrong, "\n".join(["", *wrong])


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# Imports
# --------------------------------------------------------------------------------------------------


def test_no_module_imports_itself_through_others():
    graph = {name: sorted(imported(name) & set(modules())) for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            pytest.fail("an import cycle: " + " -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("racecore.commands", ("racecore.commands", "racecore.cli", "racecore.__main__")),
        ("racecore.adapters", ("racecore.adapters",)),
        ("racecore.cli", ("racecore.__main__",)),
    ],
)
def test_the_outermost_packages_are_imported_by_nothing_else(package, importers):
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if not within(name, *importers)
        for other in imported(name)
        if within(other, package)
    ]
    none_of(wrong)


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_what_is_below_it(layer):
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if within(name, layer)
        for other in imported(name)
        if within(other, "racecore") and not within(other, layer, *BELOW[layer])
    ]
    none_of(wrong)


def test_frameworks_are_imported_in_adapters_only():
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if not within(name, "racecore.adapters")
        for other in imported(name)
        if within(other, *FRAMEWORKS)
    ]
    none_of(wrong)


def test_no_package_hides_a_module_behind_another_object_of_its_name():
    """``import racecore.x as x`` gives the attribute of the package: it has to be the module."""
    wrong = []
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    bound = alias.asname or alias.name
                    if f"{name}.{bound}" in modules() and node.module != name:
                        wrong.append(f"{name}.{bound}")
    none_of(wrong)


# Sizes
# --------------------------------------------------------------------------------------------------


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the functions of a module, nested ones and methods too, by dotted name."""
    stack: list[tuple[str, ast.AST]] = [(module, modules()[module])]
    while stack:
        name, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}"
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield inner, child
            stack.append((inner, child))


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    found = function.args
    names = [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def writes_code(module: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    # @codegen(...) is a call, @intrinsic a name
    decorators = [getattr(node, "func", node) for node in function.decorator_list]
    names = {node.id for node in decorators if isinstance(node, ast.Name)}
    return within(module, "racecore.ops") and bool(GENERATORS & names)


def test_functions_take_few_arguments():
    wrong = []
    for module in modules():
        for name, function in functions(module):
            arguments = arguments_of(function)
            if name in PUBLIC_CONTRACT:
                arguments = arguments[: len(arguments) - len(function.args.kwonlyargs)]
            exempt = name in OPERATORS or writes_code(module, function)
            if len(arguments) > MOST_ARGUMENTS and not exempt:
                wrong.append(f"{name}: {len(arguments)}")
    none_of(wrong)


def test_every_exemption_is_needed():
    long = {
        name
        for module in modules()
        for name, function in functions(module)
        if len(arguments_of(function)) > MOST_ARGUMENTS
    }
    none_of(sorted((PUBLIC_CONTRACT | OPERATORS) - long))


def test_modules_are_short():
    lines = {name: len(path_of(name).read_text().splitlines()) for name in modules()}
    none_of([f"{name}: {n}" for name, n in lines.items() if n > MOST_LINES])


def test_lines_are_short():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources("racecore")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]
    none_of(wrong)


def test_there_are_comments():
    """Reasons, shapes and measurements: lines that are comments or end in one."""
    n_comments = n_lines = 0
    for name in modules():
        n_lines += len(path_of(name).read_text().splitlines())
        n_comments += len({line for line, _ in comments(path_of(name))})
    assert 1000 * n_comments / n_lines >= LEAST_COMMENTS


def test_the_formatter_has_no_exceptions():
    # in two parts, so that this file does not find itself
    pattern = re.compile(r"#\s*fmt:\s*" + r"(skip|off)")
    folders = ("racecore", "tests", "examples", "asv_benchmarks", "docs", "studies")
    wrong = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in sources(folder)
        if pattern.search(path.read_text())
    ]
    none_of(wrong)


def sources(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


# Names and prose
# --------------------------------------------------------------------------------------------------

# Words that a reader of the literature would have to learn, the field's words for them, and where
# the word means what it means everywhere.
WORDS: list[tuple[str, str, tuple[str, ...]]] = [
    (r"ask(s|ed|ing)?[ _]?(ahead|rows|memory)|ahead", "prefetch", ()),
    (r"ask(s|ed|ing)? (a|the|of a|of the) state", "read out, query the state", ()),
    (r"in every lane|spread (over|in|to) (all|every)", "broadcast, splat", ()),
    (r"narrow(s|ed|ly)?", "half precision", ("racecore/adapters/jax.py",)),
    (r"rankings?|clears? the bar|everybody", "top-k, threshold, candidate", ()),
    (r"nobody|whoever", "a noun: the caller, a listener, no kernel", ()),
    (r"coarse(ly|r)?|settl(e|es|ed|ing)", "bounds, top-k by bounds", ()),
    (r"listed|(row|token) lists?", "gathered, row addresses", ()),
    (r"in series|side by side", "serial, segmented", ()),
    (r"(?<!ast\.)(?<!os\.)walk(s|ed|ing)?", "causal scan", ()),
    (r"brought", "to_host, to_device", ()),
    (r"rooms?|sign at the door", "module, folder, buffer, capacity", ()),
    (r"tells?( whether)?", "return, check", ()),
    (r"takes? turns|amounts? to|go(es)? its own way", "the plain verb", ()),
    (r"wh(at|ere) [a-z ]{3,30} (lies?|lay)", "a noun: device, address, index", ()),
]


@cache
def comments(path: pathlib.Path) -> list[tuple[int, str]]:
    """Return the comments of a file by line."""
    tokens = tokenize.tokenize(io.BytesIO(path.read_bytes()).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


@cache
def prose(module: str) -> list[tuple[int, str]]:
    """Return the comments, the docstrings and the names that a module defines, by line."""
    return list(_prose(module))


def _prose(module: str) -> Iterator[tuple[int, str]]:
    yield from comments(path_of(module))
    for node in ast.walk(modules()[module]):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, re.sub(r"\s+", " ", value.value)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, spaced(node.name)
        elif isinstance(node, ast.arg):
            yield node.lineno, spaced(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, spaced(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, spaced(node.attr)


def spaced(name: str) -> str:
    """Return the words of an identifier: `rows_askedFor` has three."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).strip().lower()


@pytest.mark.parametrize(("pattern", "instead", "allowed"), WORDS, ids=[w[0] for w in WORDS])
def test_words_are_those_of_the_field(pattern, instead, allowed):
    expression = re.compile(rf"\b({pattern})\b", re.IGNORECASE)
    wrong = []
    for module in modules():
        file = path_of(module).relative_to(ROOT).as_posix()
        if file in allowed:
            continue
        for line, text in prose(module):
            match = expression.search(text)
            if match:
                wrong.append(f"{file}:{line}: {match[0]!r}, write {instead}")
    for path in sorted([*PACKAGE.rglob("*.cu"), *PACKAGE.rglob("*.cuh")]):
        for line, text in enumerate(path.read_text().splitlines(), 1):
            match = expression.search(text.partition("//")[2])
            if match:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}, write {instead}")
    none_of(wrong)
