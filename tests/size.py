"""python tests/size.py (`make size`): the sizes of the code, and the depth and the cycles of its imports."""

import ast
from itertools import chain
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]


def lines(*patterns: str) -> dict[str, int]:
    """The lines of each file of the checkout that a pattern names."""
    paths = sorted(set(chain.from_iterable(ROOT.glob(pattern) for pattern in patterns)))
    return {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def longest(kind: type | tuple[type, ...], pattern: str = "lvmlib/**/*.py") -> dict[str, int]:
    """The lines of each class, or each function, with its docstring."""
    return {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in ROOT.glob(pattern)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kind)
    }


def floors(graph: grimp.ImportGraph) -> tuple[int, list[str]]:
    """How many modules lie on the longest chain of imports, and the modules in cycles or between two of them."""
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    depth = 0
    while free := {module for module, imports in left.items() if not imports & left.keys()}:
        left = {module: imports for module, imports in left.items() if module not in free}
        depth += 1
    while left.keys() - set().union(*left.values()):  # what only leads to a cycle
        left = {module: imports for module, imports in left.items() if module in set().union(*left.values())}
    return depth, sorted(left)


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
CORE, ALL, TESTS = "lvmlib/*.py", "lvmlib/**/*.py", "tests/**/*.py"


if __name__ == "__main__":
    for name, pattern in (("core", CORE), ("lvmlib", ALL), ("tests", TESTS)):
        found = lines(pattern)
        print(f"{name:<9} {sum(found.values()):>6,} lines in {len(found)} files")
    for name, sizes in (("file", lines(ALL)), ("class", longest(ast.ClassDef)), ("function", longest(FUNCTION))):
        top = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        print(f"longest {name:<8} {'; '.join(f'{size} {place}' for place, size in top)}")
    graph = grimp.build_graph("lvmlib", cache_dir=None)
    for kind in ("modules", "core files and packages"):
        depth, cycles = floors(graph)
        print(f"imports   {graph.count_imports()} between {len(graph.modules)} {kind} on {depth} floors; "
              f"in cycles: {', '.join(cycles) or 'none'}")  # fmt: skip
        for package in graph.find_children("lvmlib"):
            graph.squash_module(package)
