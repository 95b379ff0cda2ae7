"""ir.Function -> Program: one flat list of operations with names resolved to rows and addresses.

Lowering does what an assembler and a loader would: expands scopes, lays out shared, local and
parameter space, turns labels into program counters and inlines `call`.  The semantics of each
operation come from `table.INSTRUCTIONS`; this file knows only the syntax of operands.
"""

from dataclasses import dataclass

from mirage_hello.ptx.emulator import ir
from mirage_hello.ptx.emulator.operands import (
    SHARED_BASE,
    TAG_SHIFT,
    TAG_VARIABLE,
    Const,
    List,
    Not,
    Place,
    Slot,
    Special,
    Target,
    TensorPlace,
    Two,
)
from mirage_hello.ptx.emulator.specials import SPECIALS
from mirage_hello.ptx.emulator.table import Op, PtxError, bind


def _align(value, to):
    return -(-value // to) * to


@dataclass
class Variable:
    """Where a declared variable lives: its space and address or offset."""

    space: str
    offset: int
    nbytes: int
    name: str


class Program:
    """The lowered kernel.

    `ops` is indexed by program counter; `rows` lists (name, bits) of the register file; `params`
    maps each kernel parameter to (offset, type, count); `shared_static` and `local_bytes` are sizes
    in bytes; `dynamic_align` is 0 when the kernel has no extern shared array.
    """

    def __init__(self, module, function):
        self.module, self.function = module, function
        self.ops, self.rows, self.labels, self.params = [], [], {}, {}
        self.shared_static, self.dynamic_align, self.local_bytes = 0, 0, 0
        self.watched, self.suspects = frozenset(), frozenset()
        self._dynamic_names, self._calls, self._open_calls = [], 0, []
        scope = self._module_scope()
        offset = 0
        for p in function.parameters:
            offset = _align(offset, p.align)
            self.params[p.name] = (offset, p.type, p.count)
            scope[p.name] = Variable("param", offset, p.nbytes, p.name)
            offset += p.nbytes
        self.param_bytes = _align(max(offset, 8), 8)
        self._collect_shared(function.body, function.name, scope)
        self._lower(function.body, [scope], None)
        self._append(ir.Instruction("exit", (), None, function.line, 1), [scope])
        bind(self)

    # ---- variables ---------------------------------------------------------------------------
    def _module_scope(self):
        scope, tag = {}, TAG_VARIABLE
        for v in self.module.variables:
            if v.space == "shared":
                self._place_shared(v, scope)
                continue
            scope[v.name] = Variable(v.space, tag << TAG_SHIFT, v.nbytes, v.name)
            tag += 1
        return scope

    def _place_shared(self, v, scope):
        if v.extern:
            self.dynamic_align = max(self.dynamic_align, v.align)
            scope[v.name] = variable = Variable("shared", 0, 0, v.name)
            self._dynamic_names.append(variable)
            return
        offset = _align(self.shared_static, v.align)
        scope[v.name] = Variable("shared", SHARED_BASE + offset, v.nbytes, v.name)
        self.shared_static = offset + v.nbytes

    def _collect_shared(self, scope, owner, names):
        """Shared variables declared inside the body exist once per block."""
        for s in scope.statements:
            if isinstance(s, ir.Scope):
                self._collect_shared(s, owner, names)
            elif isinstance(s, ir.Variable) and s.space == "shared":
                self._place_shared(s, names)
        for variable in self._dynamic_names:
            variable.offset = SHARED_BASE + _align(self.shared_static, max(self.dynamic_align, 16))

    @property
    def dynamic_base(self):
        return SHARED_BASE + _align(self.shared_static, max(self.dynamic_align, 16))

    def new_row(self, name, bits):
        self.rows.append((name, bits))
        return Slot(len(self.rows) - 1, bits, name)

    def _local(self, name, nbytes, align):
        offset = _align(self.local_bytes, max(align, 1))
        self.local_bytes = offset + nbytes
        return Variable("local", offset, nbytes, name)

    # ---- statements --------------------------------------------------------------------------
    def _lower(self, body, scopes, end_label):
        scopes = [*scopes, {}]
        prefix = f"{id(scopes[-1])}:"
        for s in body.statements:
            if isinstance(s, ir.Label):
                scopes[-1][s.name] = Target(prefix + s.name)
        for s in body.statements:
            if isinstance(s, ir.Registers):
                bits = 1 if s.type == "pred" else max(16, 8 * ir.type_bytes(s.type))
                scopes[-1].update({n: self.new_row(n, bits) for n in s.names})
            elif isinstance(s, ir.Variable):
                if s.space in ("local", "param"):
                    scopes[-1][s.name] = self._local(s.name, s.nbytes, s.align)
                elif s.space != "shared":
                    self._fail(s, f".{s.space} variables belong outside functions")
            elif isinstance(s, ir.Label):
                self.labels[scopes[-1][s.name].name] = len(self.ops)
            elif isinstance(s, ir.Scope):
                self._lower(s, scopes, end_label)
            else:
                self._statement(s, scopes, end_label)

    def _statement(self, s, scopes, end_label):
        base = s.opcode.split(".")[0]
        if base == "call":
            self._inline(s, scopes)
        elif base == "ret" and end_label is not None:
            jump = ir.Instruction("bra", (ir.Name(end_label),), s.guard, s.line, s.column)
            self._append(jump, [*scopes, {end_label: Target(end_label)}])
        else:
            self._append(s, scopes)

    def _append(self, s, scopes):
        operands = tuple(self._operand(o, scopes, s) for o in s.operands)
        guard = None
        if s.guard:
            guard = (self._find(s.guard[0], scopes, s), s.guard[1])
        text = self.module.source(s.line)
        self.ops.append(Op(self, len(self.ops), s.opcode, operands, guard, s.line, text))

    def _fail(self, s, message):
        raise PtxError(f"{self.module.name}:{s.line}: {message}")

    def _find(self, name, scopes, s):
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return self._fail(s, f"{name} is not declared here")

    # ---- operands ----------------------------------------------------------------------------
    def _operand(self, o, scopes, s):
        if isinstance(o, ir.Number):
            return Const(o.value, o.kind)
        if isinstance(o, ir.Name):
            return self._name(o, scopes, s)
        if isinstance(o, ir.Vector | ir.Arguments):
            return List(tuple(self._operand(e, scopes, s) for e in o.elements))
        if isinstance(o, ir.Address):
            return self._place(o.base, o.offset, scopes, s)
        if isinstance(o, ir.TensorAddress):
            place = self._place(ir.Name(o.map.name), o.map.offset, scopes, s)
            coordinates = tuple(self._operand(e, scopes, s) for e in o.coordinates.elements)
            return TensorPlace(place, coordinates)
        if isinstance(o, ir.Negated):
            return Not(self._find(o.name, scopes, s))
        first, second = (
            None if n == "_" else self._find(n, scopes, s) for n in (o.first, o.second)
        )
        return Two(first, second)

    def _name(self, o, scopes, s):
        if o.name == "_":
            return None
        for scope in reversed(scopes):
            if o.name in scope:
                found = scope[o.name]
                if isinstance(found, Variable):
                    return Const(found.offset + o.offset)
                return found
        if o.name.split(".")[0] in SPECIALS:
            return Special(o.name)
        if o.name == "WARP_SZ":
            return Const(32)
        return self._fail(s, f"{o.name} is neither a register, a label, a variable nor special")

    def _place(self, base, offset, scopes, s):
        if base is None:
            return Place(None, offset)
        found = self._find(base.name, scopes, s)
        if isinstance(found, Variable):
            return Place(None, found.offset + offset, found.space)
        return Place(found, offset)

    # ---- calls -------------------------------------------------------------------------------
    def _inline(self, s, scopes):
        """`call (results), f, (arguments);` becomes the body of f with its own registers."""
        lists = [o for o in s.operands if isinstance(o, ir.Arguments)]
        name = next((o.name for o in s.operands if isinstance(o, ir.Name)), None)
        f = self.module.functions.get(name)
        if f is None or f.body is None:
            self._fail(s, f"call: {name} has no body in this module (indirect calls do not work)")
        first_is_result = bool(f.returns)
        results = lists[0].elements if first_is_result and lists else ()
        arguments = lists[-1].elements if len(lists) > first_is_result else ()
        if len(results) != len(f.returns) or len(arguments) != len(f.parameters):
            self._fail(
                s, f"call: {name} takes {len(f.parameters)} arguments, returns {len(f.returns)}"
            )
        if name in self._open_calls:
            self._fail(s, f"call: {name} is recursive, which needs a stack; write a loop")
        self._calls += 1
        inner = {k: v for k, v in scopes[0].items() if not isinstance(v, Slot)}
        after = []
        for formal, actual in zip((*f.parameters, *f.returns), (*arguments, *results), strict=True):
            self._bind_formal(s, formal, actual, scopes, inner, after, formal in f.returns)
        self._collect_shared(f.body, name, inner)
        end = f"end of {name} #{self._calls}"
        self._guarded_call(s, scopes, f, inner, end)
        for instruction, names in after:
            self._append(instruction, names)

    def _guarded_call(self, s, scopes, f, inner, end):
        if s.guard:
            guard = (s.guard[0], not s.guard[1])
            skip = ir.Instruction("bra", (ir.Name(end),), guard, s.line, s.column)
            self._append(skip, [*scopes, {end: Target(end)}])
        self._open_calls.append(f.name)
        self._lower(f.body, [inner], end)
        self._open_calls.pop()
        self.labels[end] = len(self.ops)

    def _bind_formal(self, s, formal, actual, scopes, inner, after, is_result):
        """A .param formal takes the caller's variable itself; a .reg formal gets a copy."""
        value = scopes_value = None
        if isinstance(actual, ir.Name):
            for scope in reversed(scopes):
                if actual.name in scope:
                    scopes_value = scope[actual.name]
                    break
        if formal.space == "param" and isinstance(scopes_value, Variable):
            inner[formal.name] = scopes_value
            return
        if formal.space == "param":
            self._fail(s, f"call: pass {formal.name} through a .param variable")
        bits = 1 if formal.type == "pred" else max(16, 8 * ir.type_bytes(formal.type))
        value = self.new_row(formal.name, bits)
        inner[formal.name] = value
        opcode = "mov.pred" if bits == 1 else f"mov.b{bits}"
        both = [*scopes, {"formal": value}]
        if is_result:
            copy = ir.Instruction(opcode, (actual, ir.Name("formal")), None, s.line, s.column)
            after.append((copy, both))
        else:
            copy = ir.Instruction(opcode, (ir.Name("formal"), actual), None, s.line, s.column)
            self._append(copy, both)


def program(module, entry):
    """The lowered kernel `entry` of a module, kept with the module."""
    if entry not in module.programs:
        function = module.functions.get(entry)
        if function is None or function.body is None:
            known = ", ".join(module.entries) or "none"
            raise ValueError(f"{module.name}: no kernel {entry!r}; its kernels are {known}")
        module.programs[entry] = Program(module, function)
    return module.programs[entry]
