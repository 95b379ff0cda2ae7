"""The PTX grammar: every construct, and errors that say where and what was expected."""

from pathlib import Path

import pytest

from mirage_hello.ptx.emulator import PtxError, PtxSyntaxError, PtxUnsupported, ir, parse
from mirage_hello.ptx.emulator.program import program

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def kernel(body, parameters="", directives="", before=""):
    return f"{HEAD}{before}\n.visible .entry k({parameters})\n{directives}\n{{\n{body}\nret;\n}}\n"


def statements(text):
    return parse(text).functions["k"].body.statements


def test_module_header_and_entries():
    module = parse(kernel("", directives=".reqntid 128, 1, 1\n.minnctapersm 2"), name="a.ptx")
    assert (module.version, module.target, module.name) == ("8.0", "sm_90a", "a.ptx")
    assert module.entries == ["k"]
    directives = module.functions["k"].directives
    assert directives == {".reqntid": (128, 1, 1), ".minnctapersm": (2,)}


def test_cluster_and_register_directives():
    text = kernel(
        "", directives=".maxntid 256\n.explicitcluster\n.reqnctapercluster 2,1,1\n.maxnreg 64"
    )
    assert parse(text).functions["k"].directives[".reqnctapercluster"] == (2, 1, 1)


def test_parameters_with_alignment_and_arrays():
    text = kernel(
        "",
        ".param .align 64 .b8 p_map[128], .param .u64 .ptr .global .align 16 p_x, .param .f32 p_s",
    )
    (p_map, p_x, p_s) = parse(text).functions["k"].parameters
    assert (p_map.count, p_map.align, p_map.nbytes) == (128, 64, 128)
    assert (p_x.type, p_s.type) == ("u64", "f32")
    assert program(parse(text), "k").params["p_s"][0] == 136


def test_register_ranges_and_immediates():
    body = """
    .reg .b32 %a, %r<3>;
    .reg .pred %p;
    mov.b32 %a, 0x1F;
    mov.b32 %r0, -7;
    mov.b32 %r1, 0b101;
    mov.b32 %r2, 017;
    """
    registers, predicate, *moves = statements(kernel(body))
    assert registers.names == ("%a", "%r0", "%r1", "%r2") and predicate.type == "pred"
    assert [m.operands[1].value for m in moves[:4]] == [31, -7, 5, 15]


def test_hexadecimal_and_decimal_floats():
    body = """
    .reg .f32 %f; .reg .f64 %d;
    mov.f32 %f, 0f3F800000; mov.f64 %d, 0d3FF0000000000000; mov.f32 %f, 1.5e-3;
    """
    *_, a, b, c, _ = statements(kernel(body))
    assert a.operands[1] == ir.Number(0x3F800000, "f32")
    assert b.operands[1] == ir.Number(0x3FF0000000000000, "f64")
    assert c.operands[1] == ir.Number(0.0015, "decimal")


def test_guards_vectors_addresses_and_pairs():
    body = """
    .reg .pred %p, %q; .reg .b32 %r<4>; .reg .b64 %a;
    @!%p ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%a+-16];
    @%p st.shared.b32 [%r0 + 8], %r1;
    setp.lt.and.u32 %p|%q, %r0, %r1, !%q;
    LOOP: bra LOOP;
    """
    found = statements(kernel(body))
    load, store, setp = (
        s for s in found if isinstance(s, ir.Instruction) and s.opcode[:2] in ("ld", "st", "se")
    )
    assert load.guard == ("%p", True) and load.operands[1] == ir.Address(ir.Name("%a"), -16)
    assert len(load.operands[0].elements) == 4
    assert store.guard == ("%p", False) and store.operands[0].offset == 8
    assert setp.operands[0] == ir.Pair("%p", "%q") and setp.operands[3] == ir.Negated("%q")
    assert any(isinstance(s, ir.Label) and s.name == "LOOP" for s in found)


def test_tensor_operands():
    body = """
    .reg .b32 %s, %x; .reg .b64 %m; .reg .b16 %h;
    cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes
        [%s], [%m, {%x, %x}], [%s], {%h, %h};
    """
    copy = next(s for s in statements(kernel(body)) if isinstance(s, ir.Instruction))
    assert isinstance(copy.operands[1], ir.TensorAddress)
    assert len(copy.operands[1].coordinates.elements) == 2
    assert isinstance(copy.operands[3], ir.Vector)


def test_variables_in_every_space():
    before = """
    .extern .shared .align 1024 .b8 dynamic[];
    .const .f32 table[2] = {0f3F800000, 2.0};
    .global .align 8 .b64 where[1] = {table};
    """
    body = ".shared .align 16 .b8 tile[64]; .local .b32 stack[4];"
    module = parse(kernel(body, before=before))
    lowered = program(module, "k")
    assert [v.space for v in module.variables] == ["shared", "const", "global"]
    assert lowered.shared_static == 64 and lowered.local_bytes == 16
    assert lowered.dynamic_base == 2048, "the dynamic array keeps its 1024-byte alignment"


def test_nested_scopes_shadow_registers():
    body = ".reg .b32 %t; { .reg .b64 %t; mov.b64 %t, 1; } mov.b32 %t, 2;"
    lowered = program(parse(kernel(body)), "k")
    assert [bits for _, bits in lowered.rows] == [32, 64]


def test_comments_and_debug_lines_are_ignored():
    body = '/* two\nlines */ .loc 1 2 3\n.pragma "nounroll";\n// end'
    assert len(statements(kernel(body))) == 1


@pytest.mark.parametrize(
    ("body", "line", "column", "expected"),
    [
        ("mov.b32 %a, ;", 8, 13, "a register or name"),
        ("mov.b32 %a %b;", 8, 12, "','"),
        ("add.u32 %a, %b, 5", 9, 1, "';'"),
        (".reg b32 %a;", 8, 6, "a type such as .b32"),
        ("ld.global.b32 %a, [%b;", 8, 22, "']'"),
        ("mov.b32 %a, §;", 8, 13, "a register or name"),
    ],
)
def test_errors_say_where_and_what_was_expected(body, line, column, expected):
    with pytest.raises(PtxSyntaxError) as caught:
        parse(kernel(body), name="bad.ptx")
    error = caught.value
    assert (error.line, error.column) == (line, column), str(error)
    assert expected in error.expected
    assert str(error).startswith(f"bad.ptx:{line}:{column}: found ")


def test_unclosed_body_is_an_error_at_the_end():
    with pytest.raises(PtxSyntaxError, match="the end of the file"):
        parse(HEAD + ".visible .entry k() {\n ret;\n")


def test_unknown_instruction_names_itself_its_line_and_the_table():
    text = kernel(".reg .b32 %a;\ntcgen05.fence;")
    with pytest.raises(PtxUnsupported, match=r"x.ptx:9: tcgen05.fence .*instructions_\*.py"):
        program(parse(text, name="x.ptx"), "k")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %nowhere, 1;", "%nowhere is neither a register"),
        (".reg .b32 %a; .reg .b64 %b; add.u32 %a, %a, %b; mov.b64 %b, %a;", "%a"),
        ("bra NOWHERE;", "NOWHERE"),
        (".reg .b32 %a; bar.sync 16;", "barriers 0 to 15"),
        (".reg .f32 %d<4>; .reg .b64 %x; wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 "
         "{%d0,%d1,%d2,%d3}, %x, %x, 1, 1, 1, 0, 0;", "N must be a multiple of 8"),
    ],
)  # fmt: skip
def test_semantic_errors_carry_the_line(body, message):
    with pytest.raises(PtxError, match=message) as caught:
        program(parse(kernel(body), name="y.ptx"), "k")
    assert "y.ptx:8" in str(caught.value)


def test_two_thousand_lines_parse_in_two_seconds():
    import time

    vector = ", ".join(f"%r{i}" for i in range(64))
    lines = [".reg .b32 %r<64>;", ".reg .b64 %x;"]
    lines += [f"add.u32 %r{i % 64}, %r{(i + 1) % 64}, {i};" for i in range(1800)]
    wgmma = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    lines += [f"{wgmma} {{{vector}}}, %x, %x, 1, 1, 1, 0, 0;"] * 150
    text = kernel("\n".join(lines)) + f"// {Path(__file__).name} {time.time()}"
    begin = time.thread_time()  # other threads of the suite's process may be at work
    parse(text)
    assert time.thread_time() - begin < 2
