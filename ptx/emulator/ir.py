"""What a parsed PTX module is made of: plain frozen data, one class per construct of the grammar.

Operands keep the names that the text used; `program.py` resolves them to register rows, addresses
and program counters.
"""

import functools
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Name:
    """A register, special register, label or variable, plus a constant byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate: `value` is an int, or for `kind` "f32"/"f64" the raw bits of 0f.../0d..."""

    value: int | float
    kind: str = "int"


@dataclass(frozen=True, slots=True)
class Negated:
    """`!%p` as an operand."""

    name: str


@dataclass(frozen=True, slots=True)
class Pair:
    """`%a|%b`: two destinations."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Vector:
    """`{%a, %b, ...}`."""

    elements: tuple


@dataclass(frozen=True, slots=True)
class Address:
    """`[base+offset]`; base is a Name, or None for an absolute address."""

    base: Name | None
    offset: int


@dataclass(frozen=True, slots=True)
class TensorAddress:
    """`[map, {coordinates}]`."""

    map: Name
    coordinates: Vector


@dataclass(frozen=True, slots=True)
class Arguments:
    """`(a, b)` of a call."""

    elements: tuple


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `guard` is (predicate name, negated) or None."""

    opcode: str
    operands: tuple
    guard: tuple[str, bool] | None
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Label:
    name: str
    line: int


@dataclass(frozen=True, slots=True)
class Registers:
    """`.reg .type %a, %b<4>`: the names, ranges already expanded."""

    type: str
    names: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A declaration in .shared, .const, .global, .local or .param space.

    `count` is the number of elements, 0 for `name[]` (sized at launch).
    """

    space: str
    type: str
    name: str
    count: int
    align: int
    initial: tuple | None
    extern: bool
    line: int

    @property
    def nbytes(self):
        return self.count * type_bytes(self.type)


@dataclass(frozen=True, slots=True)
class Scope:
    """A nested `{ ... }` block."""

    statements: tuple


@dataclass(frozen=True, slots=True)
class Function:
    """A .entry or .func; `directives` maps ".reqntid" etc. to tuples of ints."""

    name: str
    is_entry: bool
    returns: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    directives: dict
    body: Scope | None
    line: int


@dataclass(frozen=True)
class Module:
    """A PTX file: `text` is kept for listings and messages, `name` is what errors call it."""

    name: str
    text: str
    version: str
    target: str
    variables: tuple[Variable, ...]
    functions: dict[str, Function]
    programs: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def entries(self):
        return [f.name for f in self.functions.values() if f.is_entry]

    @functools.cached_property
    def lines(self):
        return self.text.split("\n")

    def source(self, line):
        """The instruction at a line, without its comment."""
        return self.lines[line - 1].split("//")[0].strip() if 0 < line <= len(self.lines) else ""


def type_bytes(kind):
    """Size in bytes of a PTX type name without its dot; a predicate counts 1."""
    if kind == "pred":
        return 1
    if kind in ("bf16", "f16"):
        return 2
    if kind in ("f16x2", "bf16x2", "tf32"):
        return 4
    if kind in ("e4m3", "e5m2"):
        return 1
    return int(kind[1:]) // 8
