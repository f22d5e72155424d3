"""Would the tests notice a fault? Small changes of one file of the analysis, each made alone in a process of its own.

    python tests/helpers/mutants.py FILE COUNT [SEED]

draws COUNT of the changes that are possible in ouroboros/analysis/FILE.py, runs the analysis' tests with each, and
prints those that no test finds (docs/artifact.md; a change takes 10 to 60 seconds). Nothing is written.
"""

import ast
import contextlib
import copy
import importlib.machinery
import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("claims", "metrics", "comparison", "audit", "overview", "reference_losses", "ledger", "pays")
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """(what, a function that does it to the same node of a copy) of each small change of one node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "comparison", lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        yield "constant", lambda n: setattr(n, "value", not n.value if isinstance(n.value, bool) else n.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.comprehension) and node.ifs:
        yield "filter", lambda n: setattr(n, "ifs", [])
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", lambda n: setattr(n, "value", ast.Constant(None))


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Each small change of a module, with the module after it."""
    for place, node in enumerate(ast.walk(tree)):
        for number, (what, _) in enumerate(changes(node)):
            changed = copy.deepcopy(tree)
            target = next(n for at, n in enumerate(ast.walk(changed)) if at == place)
            [*changes(target)][number][1](target)
            line = getattr(node, "lineno", None) or node.iter.lineno  # a filter has none of its own
            yield f"line {line}, {what}: {ast.unparse(node)[:90]}", ast.fix_missing_locations(changed)


def found(module: str, tree: ast.Module, seconds: int = 0) -> bool:
    """Whether a test fails, or they take longer (0: never), with a changed module in the real one's place."""
    child = os.fork()
    if child == 0:
        code, real = compile(tree, module, "exec"), importlib.machinery.SourceFileLoader.get_code
        importlib.machinery.SourceFileLoader.get_code = lambda self, name: code if name == module else real(self, name)
        signal.alarm(seconds)
        import pytest
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                                  *(str(ROOT / f"tests/test_{name}.py") for name in TESTS)])
        os._exit(int(failed != 0))
    return os.waitpid(child, 0)[1] != 0


def main(file: str, count: int, seed: int = 0) -> None:
    import matplotlib.pyplot  # noqa: F401  what every child would import
    import scipy.stats  # noqa: F401
    import transformers  # noqa: F401

    module = f"ouroboros.analysis.{file}"
    whole = ast.parse((ROOT / f"ouroboros/analysis/{file}.py").read_text(encoding="utf-8"))
    every = [*mutants(whole)]
    begun = time.monotonic()
    if found(module, whole):
        sys.exit("the tests fail without any change")
    seconds = 60 + int(4 * (time.monotonic() - begun))  # an endless loop is found too
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    left = []
    for what, tree in drawn:
        if not found(module, tree, seconds):
            left.append(what)
            print("not found:", what, flush=True)
    print(f"{file}: {len(every)} possible, {len(drawn)} drawn, {len(drawn) - len(left)} found")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
