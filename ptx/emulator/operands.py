"""What an operand is once names are resolved, and where the address spaces lie."""

from dataclasses import dataclass

# Shared memory of a block starts at 0x400, as on the hardware: the first 1 KiB is reserved, and
# a dynamic array that asks for 1024-byte alignment begins exactly there.
SHARED_BASE = 1024

# Address tags: the upper bits (address >> 40) of a generic address.  Allocations of a launch are
# 1, 2, 3, ...; two neighbours are 1 TiB apart, so no wrong index ever lands in another tensor.
TAG_SHIFT = 40
TAG_VARIABLE = 0x4000  # .global and .const variables of the module
TAG_SHARED, TAG_LOCAL, TAG_PARAM = 0xF000, 0xF001, 0xF002


@dataclass(frozen=True, slots=True)
class Slot:
    """A virtual register: `row` in the register file, width in bits (1 for predicates)."""

    row: int
    bits: int
    name: str


@dataclass(frozen=True, slots=True)
class Const:
    """An immediate or a symbol's address."""

    value: int | float
    kind: str = "int"


@dataclass(frozen=True, slots=True)
class Special:
    name: str


@dataclass(frozen=True, slots=True)
class Target:
    """A label: its program counter once the whole function is lowered."""

    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """A memory operand: base register or None, byte offset; `space` overrides the opcode's."""

    base: Slot | None
    offset: int
    space: str | None = None


@dataclass(frozen=True, slots=True)
class Not:
    slot: Slot


@dataclass(frozen=True, slots=True)
class Two:
    """`%a|%b`; None where the text has the sink `_`."""

    first: Slot | None
    second: Slot | None


@dataclass(frozen=True, slots=True)
class List:
    elements: tuple


@dataclass(frozen=True, slots=True)
class TensorPlace:
    map: Place
    coordinates: tuple
