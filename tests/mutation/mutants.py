"""Mutants of a source file: small faults, each of which a test should notice.

C is changed by a few operators over its text; Python by those of cosmic-ray, of which only
the operators are used, so that the layout of the packages does not matter, and by one that
removes statements.

A mutant is known by its file, its operator, the line that it changes and its number among
the mutants that agree in these: edits elsewhere in the file leave it the same mutant.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import hashlib
import re
import typing
from collections.abc import Callable, Iterator

__all__ = ["Mutant", "mutants_of", "statement_spans"]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file.

    :param before: the first line that changes, without indentation
    :param nth: number among the mutants with the same file, operator and line
    :param line: number of that line, from 1
    """

    file: str
    operator: str
    before: str
    nth: int
    line: int = dataclasses.field(compare=False)
    make: Callable[[], str] = dataclasses.field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """A name that is the same as long as the line is."""
        return f"{self.file}: {self.operator} {self.nth}: {self.before}"

    def rank(self, seed: int) -> float:
        """A number in [0, 1) by which samples are drawn: the same after edits elsewhere."""
        digest = hashlib.sha256(f"{seed}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)

    def after(self, text: str) -> str:
        """The changed line of the mutant; "" if it is gone."""
        old, new = text.splitlines(), self.make().splitlines()
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))
        return new[at].strip() if at < len(new) else ""


#: (offset, operator, makes the new text)
Change = tuple[int, str, Callable[[], str]]


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    changes = _c_changes(text) if file.endswith(".c") else _python_changes(text)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    found = []
    for offset, operator, make in sorted(changes, key=lambda change: change[:2]):
        start = text.rfind("\n", 0, offset) + 1
        before = text[start:].partition("\n")[0].strip()
        line = text.count("\n", 0, offset) + 1
        found.append(Mutant(file, operator, before, seen[operator, before], line, make))
        seen[operator, before] += 1
    return found


def statement_spans(file: str, text: str) -> dict[int, tuple[int, int]]:
    """Return the first and last line of the statement that each line belongs to.

    Of a compound statement, the lines before its body.
    """
    return _c_spans(text) if file.endswith(".c") else _python_spans(text)


def _c_spans(text: str) -> dict[int, tuple[int, int]]:
    code = _NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    spans, start = {}, 1
    for number, line in enumerate(code.splitlines(), 1):
        if not line.strip():
            start = start if start < number else number + 1
        elif line.rstrip().endswith((";", "{", "}", ":")):
            spans.update((at, (start, number)) for at in range(start, number + 1))
            start = number + 1
    return spans


def _python_spans(text: str) -> dict[int, tuple[int, int]]:
    spans = {}
    for node in ast.walk(ast.parse(text)):  # outer statements before inner ones
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno
            span = node.lineno, max(node.lineno, end)
            spans.update((at, span) for at in range(node.lineno, node.end_lineno + 1))
    return spans


def _replace(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


# -- C -------------------------------------------------------------------------

_NOT_CODE = re.compile(
    r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])+\'|^[ \t]*#(?:\\\n|[^\n])*',
    re.S | re.M,
)
_TOKENS = {
    "relational": {
        " < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ",
    },
    "logical": {" && ": " || ", " || ": " && "},
    "arithmetic": {
        " + ": " - ", " - ": " + ", " & ": " | ", " | ": " & ", " << ": " >> ", " >> ": " << ",
        "~": "",
    },
    # From plain.h: the same without atomicity.
    "plain": {
        "__atomic_fetch_add(": "plain_fetch_add(",
        "__atomic_fetch_sub(": "plain_fetch_sub(",
        "__atomic_fetch_and(": "plain_fetch_and(",
        "__atomic_fetch_or(": "plain_fetch_or(",
        "__atomic_exchange_n(": "plain_exchange(",
        "__atomic_compare_exchange_n(": "plain_compare_exchange(",
    },
}  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])(\d+)(?=(?:u|l|ul|ull)?\b(?!\w))", re.I)
_IF = re.compile(r"\bif \(")
_STATEMENT = re.compile(r"(?<=[;{}\n)])\n([ \t]+)((?:[\w*(&][^;{}]*?));(?=[ \t]*\n)")
_EFFECT = re.compile(r"\*?[\w>.\[\]*\-()&\s/]*(?:[^=!<>]=[^=]|\+\+|--)|\w+\(|\(void\)\w+\(")
_NO_STATEMENT = re.compile(
    r"(?:const|static|struct|union|enum|unsigned|signed|int|char|bool|void|double|float|size_t"
    r"|ssize_t|off_t|u?int\d+_t|return|goto|break|continue|case|default|if|for|while|do|else"
    r"|switch|pthread_\w+_t|kh_\w+_fn|typedef|extern|_Static_assert|__attribute__)\b"
)


def _c_changes(text: str) -> Iterator[Change]:
    code = _NOT_CODE.sub(lambda m: re.sub(r"[^\n]", "\0", m[0]), text)
    for operator, tokens in _TOKENS.items():
        for old, new in tokens.items():
            for found in re.finditer(re.escape(old), code):
                yield (
                    found.start() + 1,
                    operator,
                    functools.partial(_replace, text, found.start(), found.end(), new),
                )
    for found in _NUMBER.finditer(code):
        more = str(int(found[1], 8 if found[1].startswith("0") else 10) + 1)
        yield found.start(), "number", functools.partial(_replace, text, *found.span(1), more)
    for found in _IF.finditer(code):
        end = _closing(code, found.end() - 1)
        condition = f"(!({text[found.end() : end]}))"
        yield (
            found.start(),
            "negate",
            functools.partial(_replace, text, found.end() - 1, end + 1, condition),
        )
    for found in _STATEMENT.finditer(code):
        if not _NO_STATEMENT.match(found[2]) and _balanced(found[2]):
            yield found.start(2), "remove", functools.partial(_replace, text, *found.span(2), "")


def _closing(code: str, start: int) -> int:
    """Return the offset of the parenthesis that closes the one at ``start``."""
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] == "(") - (code[at] == ")")
        if not depth:
            return at
    raise ValueError(f"no closing parenthesis after offset {start}")


def _balanced(statement: str) -> bool:
    """Whether it is a call or an assignment of its own."""
    if statement.count("(") != statement.count(")"):
        return False
    return bool(_EFFECT.match(statement))


# -- Python --------------------------------------------------------------------

_PAIRS = {
    "ReplaceComparisonOperator": (
        "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is",
    ),
    "ReplaceBinaryOperator": (
        "Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul", "Mod_FloorDiv",
        "LShift_RShift", "RShift_LShift", "BitAnd_BitOr", "BitOr_BitAnd",
    ),
    "ReplaceUnaryOperator": ("Delete_Not", "Delete_Invert", "Delete_USub"),
}  # fmt: skip
_SINGLE = (
    "AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    "ZeroIterationForLoop",
)  # fmt: skip


def _operators() -> list[str]:
    pairs = [f"{kind}_{pair}" for kind, kinds in _PAIRS.items() for pair in kinds]
    return [f"core/{name}" for name in (*_SINGLE, *pairs)]


def _python_changes(text: str) -> Iterator[Change]:
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    skipped = _without_effect(text)
    annotations = [
        (_offset(lines, node.annotation, "start"), _offset(lines, node.annotation, "end"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.AnnAssign)
    ]

    class Positions(Visitor):
        """Collects where an operator applies, in the order in which it counts."""

        def __init__(self, operator: typing.Any) -> None:
            self.operator, self.found = operator, []

        def visit(self, node: typing.Any) -> typing.Any:
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    tree = get_ast(text)
    for name in _operators():
        operator = get_operator(name)()
        positions = Positions(operator)
        positions.walk(tree)
        for occurrence, (line, column) in enumerate(positions.found):
            offset = lines[line - 1] + column
            if line not in skipped and not any(a <= offset < b for a, b in annotations):
                yield (
                    offset,
                    name.removeprefix("core/"),
                    functools.partial(mutate_code, text, operator, occurrence),
                )
    yield from _removed(text, lines, skipped)


def _without_effect(text: str) -> set[int]:
    """Lines of imports, annotations, ``__all__``, ``TYPE_CHECKING`` and error messages."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        dull = isinstance(node, ast.Import | ast.ImportFrom | ast.Raise) or (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "__all__"
        )
        if dull:
            skipped |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            skipped |= set(range(node.lineno, node.body[0].lineno)) - {node.body[0].lineno}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    return skipped


def _offset(lines: list[int], node: typing.Any, side: str) -> int:
    """Return where a node begins or ends; in ASCII text, where columns are characters."""
    if side == "start":
        return int(lines[node.lineno - 1] + node.col_offset)
    return int(lines[node.end_lineno - 1] + node.end_col_offset)


def _removed(text: str, lines: list[int], skipped: set[int]) -> Iterator[Change]:
    """Calls, assignments to attributes and elements, and raises, replaced by ``pass``."""
    for node in ast.walk(ast.parse(text)):
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        stored = isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
        )
        if call or stored or isinstance(node, ast.Raise):
            if node.lineno in skipped and not isinstance(node, ast.Raise):
                continue
            start, end = _offset(lines, node, "start"), _offset(lines, node, "end")
            yield start, "remove", functools.partial(_replace, text, start, end, "pass")
