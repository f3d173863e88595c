"""The import graph of the package: imports point downward (ARCHITECTURE.md, "Rooms"), and rooms keep out of libraries.

The graph is read from the source with `ast`, imports inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "loqt_ds"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

# Sideways is fine, upward is not. The longest matching name counts.
LEVELS = {
    "loqt_ds.core": 0.0,
    "loqt_ds.ranks": 0.0,
    "loqt_ds.scores": 0.5,
    "loqt_ds.config": 1.0,
    "loqt_ds.method": 1.0,
    "loqt_ds.data": 1.0,
    "loqt_ds.metrics": 1.0,
    "loqt_ds.optim": 2.0,
    "loqt_ds.checkpoint": 2.0,
    "loqt_ds.shards": 2.0,
    "loqt_ds.export": 2.0,
    "loqt_ds.memory": 2.0,
    "loqt_ds.operations": 2.0,
    "loqt_ds.engines": 3.0,
    "loqt_ds.stopping": 0.0,
    "loqt_ds.failures": 1.0,
    "loqt_ds.evaluation": 3.5,
    "loqt_ds.selection": 3.5,
    "loqt_ds.generation": 1.0,
    "loqt_ds.gsm8k": 3.6,
    "loqt_ds.settling": 3.7,
    "loqt_ds.trainer": 4.0,
    "loqt_ds.rundir": 4.2,
    "loqt_ds.preflight": 4.2,
    "loqt_ds.run": 4.5,
    "loqt_ds.finish": 4.5,
    "loqt_ds.train": 5.0,
    "loqt_ds.generate": 5.0,
    "loqt_ds": 6.0,  # the façade, loqt_ds/__init__.py: nothing may lean on what it gathers
}

# Libraries a room must not know, by the start of the imported name.
FORBIDDEN = {
    "loqt_ds.core": ("torch.distributed", "deepspeed", "transformers", "loqt_ds.method"),
    "loqt_ds.method": ("torch.distributed", "deepspeed"),
    "loqt_ds.config": ("torch", "deepspeed", "transformers"),
    "loqt_ds.data": ("deepspeed",),
    "loqt_ds.optim": ("deepspeed",),
    "loqt_ds.checkpoint": ("deepspeed", "loqt_ds.engines"),
    "loqt_ds.export": ("deepspeed", "loqt_ds.engines"),
    "loqt_ds.trainer": ("deepspeed", "loqt_ds.method", "loqt_ds.core"),
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a module imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def is_within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room(name: str) -> str | None:
    """The longest entry of LEVELS that `name` lies in; the façade only for the façade itself."""
    rooms = [r for r in LEVELS if r != PACKAGE and is_within(name, r)]
    return max(rooms, key=len) if rooms else (PACKAGE if name == PACKAGE else None)


def target(name: str, modules: set[str]) -> str | None:
    """The module of the package that importing `name` reaches; None for other packages."""
    while is_within(name, PACKAGE):
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def violations(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Upward imports and forbidden libraries in {module: (source, is_package)}."""
    found = []
    for module, (source, is_package) in sources.items():
        own = room(module)
        if own is None:
            found.append(f"{module} is in no room; give it a level in {Path(__file__).name}")
            continue
        for line, name in imported_names(source, module, is_package):
            reached = target(name, set(sources))
            if reached is not None and reached != PACKAGE:
                other = room(reached)
                if other is not None and LEVELS[other] > LEVELS[own]:
                    found.append(f"{module}:{line} imports {name}: {own} may not know {other}")
            elif reached == PACKAGE and name not in (PACKAGE, f"{PACKAGE}.__version__") and own != PACKAGE:
                found.append(f"{module}:{line} imports {name} from the façade")
            for prefix in FORBIDDEN.get(own, ()):
                if is_within(name, prefix):
                    found.append(f"{module}:{line} imports {name}: {own} keeps out of {prefix}")
    return found


def package_sources() -> dict[str, tuple[str, bool]]:
    return {
        module_name(path, ROOT): (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for path in sorted(ROOT.rglob("*.py"))
    }


def test_imports_point_downward():
    sources = package_sources()
    assert len(sources) > 15
    assert violations(sources) == []


def test_there_are_no_import_cycles():
    """A cycle that is only closed by an import inside a function is no cycle when loading; one at module level is."""
    sources = package_sources()
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        tree = ast.parse(source)
        top = "\n".join(ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
        reached = {target(name, set(sources)) for _, name in imported_names(top, module, is_package)}
        graph[module] = {r for r in reached if r is not None and r != module}

    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("folder", ["launch", "tools"])
def test_launchers_and_tools_are_not_imported(folder):
    """Nothing in launch/ and tools/ is worth importing: the package does not."""
    for module, (source, is_package) in package_sources().items():
        for line, name in imported_names(source, module, is_package):
            assert not is_within(name, folder), f"{module}:{line} imports {name}"


def test_the_check_itself_sees_what_it_should():
    def check(module: str, source: str, is_package: bool = False) -> list[str]:
        others = {
            name: ("", True)
            for name in ("loqt_ds", "loqt_ds.core", "loqt_ds.method", "loqt_ds.engines", "loqt_ds.config")
        }
        return violations(others | {"loqt_ds.method.linear": ("", False), module: (source, is_package)})

    assert check("loqt_ds.core.x", "from loqt_ds.method.linear import LoQTLinear")
    assert check("loqt_ds.core.x", "from ..method import linear")
    assert check("loqt_ds.core.x", "from .. import method")
    assert check("loqt_ds.core", "from ..engines import single", True)
    assert check("loqt_ds.core.x", "def f():\n    import torch.distributed as dist")
    assert check("loqt_ds.core.x", "from torch import distributed")
    assert check("loqt_ds.method.x", "import deepspeed")
    assert check("loqt_ds.method.x", "if True:\n    from loqt_ds.engines import base")
    assert check("loqt_ds.method.x", "from loqt_ds import initialize")
    assert check("loqt_ds.attic", "")
    assert not check(
        "loqt_ds.engines.x", "from loqt_ds.method.linear import LoQTLinear\nfrom loqt_ds import __version__"
    )
    assert not check("loqt_ds.core.x", "import torch\nfrom . import y")
