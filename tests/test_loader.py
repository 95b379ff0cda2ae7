"""The loader: compile, cache, pack arguments; on a GPU: streams, graphs, threads, exit."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from mirage_hello.ptx import assembler, cache, context, cubin, loader, signature

PROBE = """
.version 8.0
.target sm_80
.address_size 64
// y[i] = a * x[i] + b for i < n
.visible .entry scale(.param .u64 p_y, .param .u64 p_x, .param .u32 p_n, .param .f32 p_a,
                      .param .f32 p_b)
{
    .reg .pred %out;
    .reg .b32  %i, %t, %n;
    .reg .b64  %y, %x, %o;
    .reg .f32  %v, %a, %b;
    ld.param.u64 %y, [p_y];
    ld.param.u64 %x, [p_x];
    ld.param.u32 %n, [p_n];
    ld.param.f32 %a, [p_a];
    ld.param.f32 %b, [p_b];
    mov.u32 %i, %ctaid.x;
    mov.u32 %t, %ntid.x;
    mul.lo.u32 %i, %i, %t;
    mov.u32 %t, %tid.x;
    add.u32 %i, %i, %t;
    setp.ge.u32 %out, %i, %n;
    @%out ret;
    mul.wide.u32 %o, %i, 4;
    add.u64 %y, %y, %o;
    add.u64 %x, %x, %o;
    ld.global.f32 %v, [%x];
    fma.rn.f32 %v, %a, %v, %b;
    st.global.f32 [%y], %v;
    ret;
}
"""
MAPPED = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry mapped(.param .align 64 .b8 p_map[128], .param .u64 p_y, .param .u32 p_n)
{ ret; }
"""


@pytest.fixture
def probe():
    return loader.Program("probe", PROBE)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scale(probe, x, a=2.0, b=1.0):
    y = torch.full_like(x, float("nan"))
    probe.launch("scale", (-(-x.numel() // 128),), (128,), (y, x, x.numel(), a, b))
    return y


def test_runs_on_either_device(probe, device):
    x = torch.randn(1000, device=device)
    torch.testing.assert_close(scale(probe, x), 2 * x + 1)


def test_integers_become_the_parameters_type(probe, device):
    x = torch.randn(10, device=device)
    torch.testing.assert_close(scale(probe, x, a=3, b=-1), 3 * x - 1)


def test_parameter_layout_of_a_tensor_map():
    code = assembler.assemble(MAPPED, "sm_90a", "mapped")
    layout = cubin.params(code, "mapped")
    codes = signature.parameter_codes(MAPPED, "mapped")
    assert codes == ("128s", "Q", "I")
    # 48: the list is moved so that constant-bank address 0x210 + 48 is a multiple of 64
    assert signature.launch_format(layout, codes) == ["48x", "128s", "Q", "I"]


def test_unknown_names_list_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no PTX source named absent \(there are: "):
        loader.program("absent")
    with pytest.raises(FileNotFoundError, match=r"no CUDA source named absent"):
        loader.cuda_program("absent")
    with pytest.raises(KeyError, match="it has scale"):
        signature.parameter_codes(PROBE, "scalee")


def test_compile_errors_carry_the_compilers_words(own_cache):
    with pytest.raises(assembler.CompileError, match=r"ptxas refuses broken for sm_80: .*line"):
        assembler.assemble(PROBE.replace("fma.rn", "fmx.rn"), "sm_80", "broken")
    with pytest.raises(assembler.CompileError, match="sm_12"):
        assembler.assemble(PROBE, "sm_12", "old")


def test_cache_builds_once_and_survives_damage(own_cache, caplog):
    first = assembler.assemble(PROBE, "sm_80")
    (entry,) = own_cache.glob("*.cubin")
    whole = entry.read_bytes()
    builds = []

    def build():
        builds.append(1)
        return b"built"

    assert assembler.assemble(PROBE, "sm_80") == first
    for damaged in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        entry.write_bytes(damaged)
        assert assembler.assemble(PROBE, "sm_80") == first
        assert entry.read_bytes() == whole
    assert "damaged" in caplog.text
    assert cache.get_or_build(("key",), build) == cache.get_or_build(("key",), build) == b"built"
    assert len(builds) == 1


def test_cache_that_cannot_be_written_is_not_fatal(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "file" / "below"))
    assert cache.get_or_build(("key",), lambda: b"built") == b"built"
    assert "cannot be" in caplog.text


def test_two_processes_build_the_same_kernel(own_cache):
    script = textwrap.dedent("""
        import sys
        from mirage_hello.ptx import assembler
        sys.stdin.readline()
        code = assembler.assemble(sys.argv[1], "sm_90a", "probe")
        sys.stdout.write(str(hash(code) != 0))
    """)
    environment = {**os.environ, "MIRAGE_CACHE": str(own_cache)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, PROBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, text=True, cwd=own_cache.parent,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in running:  # all are loaded and waiting: let them go together
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "True")
    assert len(list(own_cache.iterdir())) == 1  # one whole entry, no leftovers


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_driver_the_error_says_what_is_missing(probe):
    with pytest.raises(context.DriverError, match=r"need (the NVIDIA driver|PyCUDA): .*"):
        probe.function("scale", 0)


@pytest.mark.gpu
def test_wrong_arguments_are_named(probe):
    x = torch.randn(4, device="cuda")
    with pytest.raises(TypeError, match=r"takes 5 arguments \(got 2\)"):
        probe.launch("scale", (1,), (32,), (x, x))
    with pytest.raises(TypeError, match="argument 2 must be an int"):
        probe.launch("scale", (1,), (32,), (x, x, 4.0, 1.0, 1.0))
    with pytest.raises(RuntimeError, match=r"probe:scale: launch failed .*block \(2048"):
        probe.launch("scale", (1,), (2048,), (x, x, 4, 1.0, 1.0))


@pytest.mark.gpu
def test_order_on_side_streams(probe):
    """A long kernel before, a reader after, both on the side stream: the launch stays between."""
    x = torch.randn(1 << 22, device="cuda")
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            y = x * 3
            z = scale(probe, y) - 1
        stream.synchronize()
        torch.testing.assert_close(z, 6 * x)


@pytest.mark.gpu
def test_inside_a_cuda_graph(probe):
    x = torch.randn(1000, device="cuda")
    scale(probe, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        for _ in range(3):
            y = scale(probe, y)
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, 8 * (x + 1) + 7)


@pytest.mark.gpu
def test_a_captured_graph_is_a_plain_chain(probe):
    """n kernels have n - 1 edges between them: one from each to the next."""
    x = torch.randn(1000, device="cuda")
    scale(probe, x)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        y = x + 1
        for _ in range(5):
            probe.launch("scale", (8,), (128,), (y, y, 1000, 2.0, 1.0))
            y += 1
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    nodes, edges = ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(nodes)) == 0
    assert driver.cuGraphGetEdges(handle, None, None, ctypes.byref(edges)) == 0
    assert (nodes.value, edges.value) == (11, 10)


@pytest.mark.gpu
def test_several_threads(probe):
    results, x = {}, torch.randn(100_000, device="cuda")

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(50):
                y = scale(probe, x, a=float(i))
            torch.cuda.current_stream().synchronize()
            results[i] = y

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(8):
        torch.testing.assert_close(results[i], i * x + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["main", "thread"])
def test_the_interpreter_exits_cleanly(where, tmp_path):
    script = textwrap.dedent(f"""
        import sys, threading, torch
        from mirage_hello.ptx import loader
        def work():
            p = loader.Program("probe", sys.argv[1])
            x = torch.randn(64, device="cuda"); y = torch.empty_like(x)
            p.launch("scale", (1,), (64,), (y, x, 64, 2.0, 0.0))
            assert torch.equal(y, 2 * x)
        if "{where}" == "main":
            work()
        else:
            t = threading.Thread(target=work); t.start(); t.join()
        print("done")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, PROBE], capture_output=True, text=True, cwd=tmp_path,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
