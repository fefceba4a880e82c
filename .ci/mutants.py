"""Mutants: what one change of one place makes of a source file.

    {"id", "stratum", "path", "line", "end", "statement", "kind", "start", "stop", "old", "new"}

start and stop are bytes of the file, so that nothing else changes; line to end is the expression, statement the first
line of what it stands in. id: of the seed, the file's content and the change.

    comparison, boolean, arithmetic    another operator, a negated condition
    constant, activation               one more, the other truth value; a float 5% larger
    swap                               two neighbours among arguments, elements or indices: strides, masks, orders
    dropped                            a call, an assignment to a part, a raise, continue or break
"""

import ast
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OTHER = {"<": "<=", ">": ">=", "==": "!=", "is": "is not", "in": "not in", "and": "or", "&": "|", "//": "%", "<<": ">>"}
OTHER |= {new: old for old, new in OTHER.items()}
OTHER |= {"+": "-", "-": "+", "*": "+", "/": "*", "**": "*"}
OPERATOR = re.compile(rb"\*\*|//|<<|>>|[<>=!]=|[-+*/%&|<>]|\bis\s+not\b|\bnot\s+in\b|\b(?:is|in|and|or)\b")
SAID = re.compile(r"warn|_log\.|print|_say|Error$")  # calls whose arguments are words for the user


STRATA = {  # of 400
    "kernels": (100, ("stf_kernels/kernels/*.py",)),
    "ops": (80, ("stf_kernels/ops/*.py",)),
    "configs": (60, ("stf_kernels/configs/*.py", "stf_kernels/tune/*.py")),
    "modules": (70, ("stf_kernels/*.py", "stf_kernels/aot/*.py")),
    "converters": (90, ("llava_integration/convert/*.py", "llava_integration/warm_start.py")),
}


class Source:
    """The changes of one file, in bytes: ast counts columns in them."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.content, self.starts, self.unordered = path, content, [0], set()
        for line in content.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: Any) -> tuple[int, int]:
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        return self.content[slice(*self.span(node))].decode()

    def changes(self, node: Any, statement: Any = None) -> Iterator[dict[str, Any]]:
        """Every change of one place in the node or below it."""
        statement = node if isinstance(node, ast.stmt) else statement
        for kind, (start, stop), new in self.of(node):
            lines = {"line": node.lineno, "end": node.end_lineno, "statement": statement.lineno}
            where = {"path": self.path, **lines, "start": start, "stop": stop}
            yield where | {"kind": kind, "old": self.content[start:stop].decode(), "new": new}
        said = isinstance(node, ast.Call) and SAID.search(self.text(node.func))
        unreached = isinstance(node, ast.If) and self.text(node.test) in ("TYPE_CHECKING", '__name__ == "__main__"')
        unreached |= isinstance(node, ast.keyword) and node.arg == "strict"  # of zip: says what holds already
        for name, value in ast.iter_fields(node) if not (said or unreached or isinstance(node, ast.JoinedStr)) else ():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    yield from self.changes(child, statement)

    def of(self, node: Any) -> Iterator[tuple[str, tuple[int, int], str]]:
        match node:
            case ast.ExceptHandler():
                self.unordered.add(node.type)
            case ast.Compare():
                self.unordered |= {right for right in node.comparators if isinstance(node.ops[0], ast.In | ast.NotIn)}
                operands = [node.left, *node.comparators]
                for left, right in zip(operands, node.comparators, strict=False):
                    yield from self.operator("comparison", left, right)
            case ast.BinOp() if not self.text(node.left).startswith(('"', 'f"', "r'")):
                yield from self.operator("arithmetic", node.left, node.right)
            case ast.BoolOp():
                yield from self.operator("boolean", *node.values[:2])
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                kind = "boolean" if isinstance(node.op, ast.Not) else "arithmetic"
                yield kind, self.span(node), self.text(node.operand)
            case ast.If(test=ast.Name() | ast.Attribute() | ast.Call()) | ast.IfExp(test=ast.Name() | ast.Attribute()):
                yield "boolean", self.span(node.test), f"(not {self.text(node.test)})"
            case ast.Constant(value=bool()):
                yield "constant", self.span(node), str(not node.value)
            case ast.Constant(value=int()):
                yield "constant", self.span(node), str(node.value + 1)
            case ast.Constant(value=float()):
                kind = "activation" if "activations" in self.path else "constant"
                yield kind, self.span(node), repr(node.value * 1.05 or 1.0)
            case ast.Call() if self.text(node.func) not in ("min", "max", "tl.minimum", "tl.maximum"):
                yield from self.swaps(node.args)
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                self.unordered.add(node.value)
            case ast.Tuple(ctx=ast.Load()) | ast.List(ctx=ast.Load()) if node not in self.unordered:
                yield from self.swaps(node.elts)
            case ast.AugAssign():
                yield from self.operator("arithmetic", node.target, node.value)
        dropped = isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break)
        dropped |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        dropped |= isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
        if dropped:
            yield "dropped", self.span(node), "pass"

    def operator(self, kind: str, left: ast.AST, right: ast.AST) -> Iterator[tuple[str, tuple[int, int], str]]:
        found = OPERATOR.search(self.content, self.span(left)[1], self.span(right)[0])
        if found and (new := OTHER.get(" ".join(found[0].decode().split()))):
            yield kind, found.span(), new

    def swaps(self, items: list[Any]) -> Iterator[tuple[str, tuple[int, int], str]]:
        for first, second in pairwise(items):
            (start, stop), (begin, end) = self.span(first), self.span(second)
            if not isinstance(first, ast.Starred | ast.JoinedStr) and self.text(first) != self.text(second):
                yield "swap", (start, end), self.text(second) + self.content[stop:begin].decode() + self.text(first)


def draw(stratum: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The mutants of a stratum: the smallest hashes of every kind in turn."""
    by_kind, sources = defaultdict(list), {}
    for pattern in STRATA[stratum][1]:
        for file in sorted(ROOT.glob(pattern)):
            path, content = str(file.relative_to(ROOT)), file.read_bytes()
            sources[path], digest = content, hashlib.sha256(content).hexdigest()
            for change in Source(path, content).changes(ast.parse(content)):
                key = f"{seed} {path} {digest} {change['kind']} {change['start']} {change['stop']}"
                mutant = {"id": hashlib.sha256(key.encode()).hexdigest()[:16], "stratum": stratum} | change
                by_kind[change["kind"]].append(mutant)
    left, drawn = [sorted(group, key=lambda mutant: mutant["id"], reverse=True) for group in by_kind.values()], []
    while len(drawn) < count and any(left):
        for group in left:
            while group:
                mutant = group.pop()
                if is_another_program(sources[mutant["path"]], mutant):
                    drawn.append(mutant)
                    break
    return drawn[:count]


def mutated(content: bytes, mutant: dict[str, Any]) -> bytes:
    return content[: mutant["start"]] + mutant["new"].encode() + content[mutant["stop"] :]


def is_another_program(content: bytes, mutant: dict[str, Any]) -> bool:
    try:
        return ast.dump(ast.parse(mutated(content, mutant))) != ast.dump(ast.parse(content))
    except SyntaxError:
        return False
