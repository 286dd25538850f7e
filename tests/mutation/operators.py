"""Mutations of a Python module: each changes one place of its syntax tree, as a programmer's slip would.

What no test can be expected to see is left alone: docstrings, annotations, texts of errors and log lines, imports,
`check_integrity` (it serves tests only), and blocks under ``TYPE_CHECKING``.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
LOGGERS = {"debug", "info", "warning", "error", "exception"}
UNTOUCHED_FUNCTIONS = {"check_integrity", "__repr__"}


@dataclass(frozen=True)
class Mutant:
    """One changed place. ``line`` counts from 1; ``text`` is that line of the original, stripped."""

    line: int
    text: str
    change: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Stays the same when lines above are added or removed."""
        return f"{self.text}  ##  {self.change}"


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its lines."""
    lines = source.splitlines()
    count = sum(1 for _ in _places(ast.parse(source)))
    for number in range(count):
        tree = ast.parse(source)
        place = next(place for at, place in enumerate(_places(tree)) if at == number)
        text = lines[place.line - 1].strip()
        change = place.apply()
        yield Mutant(place.line, text, change, ast.fix_missing_locations(tree))


@dataclass
class _Place:
    """A node, the field of its parent that holds it, and what replaces it."""

    parent: ast.AST
    field: str
    index: int | None
    replacement: ast.AST
    change: str
    line: int

    def apply(self) -> str:
        if self.index is None:
            setattr(self.parent, self.field, self.replacement)
        else:
            getattr(self.parent, self.field)[self.index] = self.replacement
        return self.change


def _places(tree: ast.Module) -> Iterator[_Place]:
    yield from _visit(tree)


def _visit(node: ast.AST) -> Iterator[_Place]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params", "bases", "type_comment"):
            continue
        children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _untouched(child):
                continue
            yield from _mutations(node, field, index, child)
            yield from _visit(child)


def _untouched(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in UNTOUCHED_FUNCTIONS:
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring, or the ellipsis of a protocol
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LOGGERS


def _mutations(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> Iterator[_Place]:
    line = getattr(node, "lineno", 0)

    def place(replacement: ast.AST, change: str) -> _Place:
        return _Place(parent, field, index, ast.copy_location(replacement, node), change, line)

    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        swapped = COMPARISONS[type(node.ops[0])]
        changed = copy.deepcopy(node)
        changed.ops = [swapped()]
        yield place(changed, f"{ast.unparse(node)} -> {ast.unparse(changed)}")
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
        changed_op = copy.deepcopy(node)
        changed_op.op = ARITHMETIC[type(node.op)]()
        yield place(changed_op, f"{ast.unparse(node)} -> {ast.unparse(changed_op)}")
    elif isinstance(node, ast.BoolOp):
        changed_bool = copy.deepcopy(node)
        changed_bool.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield place(changed_bool, f"{ast.unparse(node)} -> {ast.unparse(changed_bool)}")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield place(copy.deepcopy(node.operand), f"{ast.unparse(node)} -> {ast.unparse(node.operand)}")
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield place(ast.Constant(not node.value), f"{node.value} -> {not node.value}")
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield place(ast.Constant(node.value + 1), f"{node.value} -> {node.value + 1}")
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield place(ast.Constant(node.value * 2 + 1), f"{node.value} -> {node.value * 2 + 1}")
    elif isinstance(node, ast.Break | ast.Continue | ast.Raise):
        yield place(ast.Pass(), f"{ast.unparse(node).splitlines()[0]} -> pass")
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield place(ast.Return(ast.Constant(None)), f"{ast.unparse(node)} -> return None")
    elif isinstance(node, ast.AugAssign) or _is_call(node):
        yield place(ast.Pass(), f"{ast.unparse(node)} -> pass")
    elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets):
        # ``self.x = …`` of a constructor only ends in AttributeError: not worth a run
        in_constructor = isinstance(parent, ast.FunctionDef) and parent.name == "__init__"
        if not in_constructor:
            yield place(ast.Pass(), f"{ast.unparse(node)} -> pass")
    elif isinstance(node, ast.Delete):
        yield place(ast.Pass(), f"{ast.unparse(node)} -> pass")
    if isinstance(node, ast.IfExp):
        changed_if = copy.deepcopy(node)
        changed_if.body, changed_if.orelse = changed_if.orelse, changed_if.body
        yield place(changed_if, f"{ast.unparse(node)} -> {ast.unparse(changed_if)}")
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        changed_test = copy.deepcopy(node)
        changed_test.test = ast.UnaryOp(ast.Not(), changed_test.test)
        if isinstance(node, ast.If):  # a loop that never ends tells nothing
            yield place(changed_test, f"if {ast.unparse(node.test)} -> if not {ast.unparse(node.test)}")


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in (node.left, node.right)
    )


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
