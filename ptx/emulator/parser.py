"""PTX text -> ir.Module, with lark's LALR parser.

    module = parse(text, name="silu.ptx")

The grammar is built once per process; a parsed text is kept, so launching the same kernel again
costs no parse.
"""

import functools
from pathlib import Path

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedToken

from mirage_hello.ptx.emulator import ir


class PtxSyntaxError(ValueError):
    """The text is not PTX: file, line, column, what was found and what was expected."""

    def __init__(self, name, line, column, found, expected, source):
        self.line, self.column, self.expected = line, column, expected
        wanted = ", ".join(expected[:8]) + (", ..." if len(expected) > 8 else "")
        super().__init__(
            f"{name}:{line}:{column}: found {found}, expected {wanted}\n    {source.strip()}"
        )


EXPECTED = {
    "NAME": "a register or name",
    "OPCODE": "an instruction",
    "INTEGER": "an integer",
    "DECIMAL": "a number",
    "HEX_FLOAT": "0f and 8 hexadecimal digits",
    "HEX_DOUBLE": "0d and 16 hexadecimal digits",
    "LABEL": "a label",
    "TYPE": "a type such as .b32",
    "SPACE": ".shared, .global, .const or .local",
    "REG_SPACE": ".reg",
    "PARAM_SPACE": ".param",
    "SEMICOLON": "';'",
    "COMMA": "','",
    "LSQB": "'['",
    "RSQB": "']'",
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "LPAR": "'('",
    "RPAR": "')'",
    "PLUS": "'+'",
    "VBAR": "'|'",
    "AT": "'@'",
    "NOT": "'!'",
    "LESSTHAN": "'<'",
    "MORETHAN": "'>'",
    "EQUAL": "'='",
    "ENTRY": ".entry",
    "FUNC": ".func",
    "LINKAGE": ".visible or .extern",
    "PERF": "a directive such as .reqntid",
    "NUMBER": "a version such as 8.0",
    "STRING": "a string",
    "$END": "the end of the file",
}


def integer(text):
    """Value of a PTX integer literal: decimal, 0x, 0b or octal, with an optional U."""
    digits = text.rstrip("U")
    sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits)
    if digits[:2].lower() in ("0x", "0b"):
        return sign * int(digits, 0)
    base = 8 if len(digits) > 1 and digits.startswith("0") else 10
    return sign * int(digits, base)


def _number(token):
    if token.type == "HEX_FLOAT":
        return ir.Number(int(token[2:], 16), "f32")
    if token.type == "HEX_DOUBLE":
        return ir.Number(int(token[2:], 16), "f64")
    if token.type == "DECIMAL":
        return ir.Number(float(token), "decimal")
    return ir.Number(integer(token))


class _Build(Transformer):
    """Callbacks named after the rules of grammar.lark."""

    def number(self, c):
        return _number(c[0])

    def name(self, c):
        return ir.Name(str(c[0]))

    def name_offset(self, c):
        return ir.Name(str(c[0]), integer(c[1]))

    def pair(self, c):
        return ir.Pair(str(c[0]), str(c[1]))

    def negated(self, c):
        return ir.Negated(str(c[1]))

    def vector(self, c):
        return ir.Vector(tuple(c))

    def address(self, c):
        if c[0].type == "INTEGER":
            return ir.Address(None, integer(c[0]))
        return ir.Address(ir.Name(str(c[0])), integer(c[1]) if len(c) > 1 else 0)

    def address_operand(self, c):
        return c[0]

    def tensor_operand(self, c):
        return ir.TensorAddress(c[0], c[1])

    def arguments(self, c):
        return ir.Arguments(tuple(x for x in c if x is not None))

    def guard(self, c):
        return (str(c[1]), c[0] is not None)

    def instruction(self, c):
        opcode = c[1]
        operands = tuple(x for x in c[2:] if x is not None)
        return ir.Instruction(str(opcode), operands, c[0], opcode.line, opcode.column)

    def label(self, c):
        return ir.Label(c[0].rstrip(": \t"), c[0].line)

    def register_name(self, c):
        if c[1] is None:
            return [str(c[0])]
        return [f"{c[0]}{i}" for i in range(integer(c[1]))]

    def register_declaration(self, c):
        names = tuple(name for group in c[2:] for name in group)
        return ir.Registers(c[1][1:], names, c[0].line)

    def align(self, c):
        return ("align", integer(c[0]))

    def dimension(self, c):
        return ("dimension", 0 if c[0] is None else integer(c[0]))

    def initialiser(self, c):
        flat = []
        for item in c:
            flat.extend(item if isinstance(item, tuple) else [item])
        return tuple(ir.Name(str(x)) if isinstance(x, Token) else x for x in flat)

    def variable(self, c):
        return self._declare(c)

    local_variable = parameter = variable

    def _declare(self, c):
        kind = {t.type: t for t in c if isinstance(t, Token) and t.type != "LINKAGE"}
        linkage = {str(t) for t in c if isinstance(t, Token) and t.type == "LINKAGE"}
        space = next(kind[k] for k in ("SPACE", "PARAM_SPACE", "REG_SPACE") if k in kind)
        marks = [x for x in c if isinstance(x, tuple) and x and x[0] in ("align", "dimension")]
        count = 1
        for size in (v for k, v in marks if k == "dimension"):
            count *= size
        size = ir.type_bytes(kind["TYPE"][1:])
        align = next((v for k, v in marks if k == "align"), size)
        initial = c[-1] if isinstance(c[-1], tuple) and c[-1] not in marks else None
        return ir.Variable(
            str(space)[1:], kind["TYPE"][1:], str(kind["NAME"]), count, align, initial,
            ".extern" in linkage, space.line,
        )  # fmt: skip

    def parameters(self, c):
        return tuple(x for x in c if x is not None)

    def returns(self, c):
        return c[0]

    def kind(self, c):
        return c[0]

    def pointer(self, c):
        return None

    def perf(self, c):
        return ("perf", str(c[0]), tuple(integer(x) for x in c[1:] if x is not None))

    def perf_pragma(self, c):
        return None

    def pragma(self, c):
        return None

    def body(self, c):
        return ir.Scope(tuple(x for x in c if x is not None))

    def scope(self, c):
        return c[0]

    def function(self, c):
        c = [x for x in c if not (isinstance(x, Token) and x.type == "LINKAGE")]
        kind, returns, name, parameters, *rest = c
        directives = {x[1]: x[2] for x in rest if isinstance(x, tuple) and x[0] == "perf"}
        body = next((x for x in rest if isinstance(x, ir.Scope)), None)
        return ir.Function(
            str(name), kind.type == "ENTRY", returns or (), parameters or (), directives, body,
            kind.line,
        )  # fmt: skip

    def version(self, c):
        return ("version", str(c[0]))

    def target(self, c):
        return ("target", str(c[0]))

    def address_size(self, c):
        return ("address_size", str(c[0]))

    def start(self, c):
        return [x for x in c if x is not None]


@functools.cache
def _lark():
    grammar = (Path(__file__).parent / "grammar.lark").read_text()
    return Lark(grammar, parser="lalr", transformer=_Build(), maybe_placeholders=True)


def _describe(error, name, text):
    lines = text.split("\n")
    if isinstance(error, UnexpectedEOF) or getattr(error, "token", None) == "":
        line, column, found = len(lines), len(lines[-1]) + 1, "the end of the file"
    elif isinstance(error, UnexpectedToken):
        line, column, found = error.line, error.column, repr(str(error.token))
    else:
        line, column, found = error.line, error.column, repr(error.char)
    accepted = getattr(error, "accepts", None) or getattr(error, "expected", None)
    accepted = accepted or getattr(error, "allowed", None) or ()
    expected = sorted({EXPECTED.get(t, t) for t in accepted if t not in ("COMMENT", "DEBUG_LINE")})
    expected = [e for e in expected if not e.startswith("__")]
    source = lines[line - 1] if 0 < line <= len(lines) else ""
    return PtxSyntaxError(name, line, column, found, expected, source)


@functools.lru_cache(maxsize=128)
def parse(text, name="<ptx>"):
    """PTX text -> Module.

    Args: text: the whole file; name: what messages call it.
    Returns: ir.Module, shared between calls with the same text (it is immutable).
    Raises: PtxSyntaxError with line, column and what was expected.
    """
    try:
        items = _lark().parse(text)
    except (UnexpectedToken, UnexpectedCharacters, UnexpectedEOF) as error:
        raise _describe(error, name, text) from None
    header = dict(x for x in items if isinstance(x, tuple))
    return ir.Module(
        name=name,
        text=text,
        version=header.get("version", ""),
        target=header.get("target", ""),
        variables=tuple(x for x in items if isinstance(x, ir.Variable)),
        functions={x.name: x for x in items if isinstance(x, ir.Function)},
    )
