"""Programmatic dependent launch: which kernels, the same bits in any order, edges, time saved.

The timing test prints microseconds a kernel (pytest -s).
"""

import ctypes

import pytest
import torch

from mirage_hello.ptx import loader, programmatic

# y[i] = a x[i] + b, once with an overlap and once without the two instructions. The delay before
# the store makes a missing wait visible: the next kernel would read what is not yet there.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry step(.param .u64 p_y, .param .u64 p_x, .param .u32 p_n, .param .u32 p_sleep)
{
    .reg .pred %out, %tired;
    .reg .b32  %i, %t, %n, %sleep;
    .reg .b64  %y, %x, %o;
    .reg .f32  %v;
    ld.param.u64 %y, [p_y];
    ld.param.u64 %x, [p_x];
    ld.param.u32 %n, [p_n];
    ld.param.u32 %sleep, [p_sleep];
    mov.u32 %i, %ctaid.x;
    mov.u32 %t, %ntid.x;
    mul.lo.u32 %i, %i, %t;
    mov.u32 %t, %tid.x;
    add.u32 %i, %i, %t;
    griddepcontrol.launch_dependents;
    griddepcontrol.wait;
    setp.ge.u32 %out, %i, %n;
    @%out ret;
    mul.wide.u32 %o, %i, 4;
    add.u64 %y, %y, %o;
    add.u64 %x, %x, %o;
    ld.global.f32 %v, [%x];
    fma.rn.f32 %v, %v, 0f3F7FBE77, 0f3E4CCCCD;
    setp.ne.u32 %tired, %sleep, 0;
    @%tired nanosleep.u32 %sleep;
    st.global.f32 [%y], %v;
    ret;
}
"""
PLAIN = TEXT.replace("    griddepcontrol.launch_dependents;\n    griddepcontrol.wait;\n", "")
TWO = TEXT + PLAIN[PLAIN.index(".visible") :].replace("step", "other")
PAIR = 4096  # elements


@pytest.fixture(scope="module")
def overlapping() -> loader.Program:
    return loader.Program("overlapping", TEXT)


@pytest.fixture(scope="module")
def plain() -> loader.Program:
    return loader.Program("plain", PLAIN)


def chain(program, buffers, count, sleep=0, n=PAIR):
    """`count` kernels, each reads what the one before it wrote; the last buffer written."""
    for i in range(count):
        x, y = buffers[i % 2], buffers[1 - i % 2]
        program.launch("step", (-(-n // 256),), (256,), (y, x, n, sleep))
    return buffers[count % 2]


def pair(device, n=PAIR):
    x = torch.linspace(-3, 3, n, device=device)
    return [x, torch.full_like(x, float("nan"))]


def test_a_kernel_waits_when_its_own_text_says_so():
    assert programmatic.waits(TEXT, "step")
    assert not programmatic.waits(PLAIN, "step")
    assert programmatic.waits(TWO, "step") and not programmatic.waits(TWO, "other")
    assert not programmatic.waits(PLAIN.replace("ret;", "ret; // griddepcontrol.wait"), "step")
    assert not programmatic.waits(PLAIN.replace("ret;", "/* griddepcontrol.wait\n */ ret;"), "step")


def test_the_launch_configuration_has_the_drivers_layout():
    """Sizes and offsets of CUlaunchConfig and CUlaunchAttribute in cuda.h of CUDA 12 and 13."""
    config, attribute = programmatic._Config, programmatic._Attribute
    assert (ctypes.sizeof(config), config.stream.offset, config.count.offset) == (56, 32, 48)
    assert (ctypes.sizeof(attribute), attribute.value.offset) == (72, 8)


def test_the_same_values_on_either_device(overlapping, plain):
    out = chain(overlapping, pair("cpu"), 5)
    assert torch.equal(out, chain(plain, pair("cpu"), 5))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["default stream", "side stream", "graph"])
@pytest.mark.parametrize("sleep", [0, 20_000])
def test_the_same_bits_with_and_without_overlap(overlapping, plain, where, sleep):
    count = 40

    def run(program):
        buffers = pair("cuda")
        first = buffers[0].clone()
        chain(program, buffers, 2)  # compiled and loaded before a capture
        if where == "default stream":
            buffers[0].copy_(first)
            return chain(program, buffers, count, sleep).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if where == "side stream":
                buffers[0].copy_(first)
                out = chain(program, buffers, count, sleep).clone()
            else:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    buffers[0].copy_(first)
                    out = chain(program, buffers, count, sleep).clone()
                graph.replay()
                graph.replay()
        stream.synchronize()
        return out

    expected = run(plain)
    assert torch.equal(run(overlapping), expected)
    with programmatic.without_overlap():
        assert torch.equal(run(overlapping), expected)


def edge_types(graph) -> list[int]:
    """CUgraphDependencyType of each edge; 1 is programmatic."""
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    count = ctypes.c_size_t()
    assert driver.cuGraphGetEdges_v2(handle, None, None, None, ctypes.byref(count)) == 0
    nodes = [(ctypes.c_void_p * count.value)() for _ in range(2)]
    data = (ctypes.c_ubyte * 8 * count.value)()
    assert driver.cuGraphGetEdges_v2(handle, *nodes, data, ctypes.byref(count)) == 0
    return [int(edge[2]) for edge in data]


@pytest.mark.gpu
def test_edges_of_a_captured_graph(overlapping, plain):
    """Every edge into an overlapping kernel from a kernel is programmatic, whoever launched that
    one; from a copy it is a full one; and the graph is one chain."""
    buffers = pair("cuda")
    for program in (overlapping, plain):
        chain(program, buffers, 2)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        buffers[1].copy_(buffers[0])  # a copy node
        chain(overlapping, buffers, 3)  # full, programmatic, programmatic
        buffers[0].add_(1)  # torch's kernel: full
        chain(overlapping, buffers, 1)  # programmatic
        chain(plain, buffers, 2)  # by PyCUDA: full, full
        chain(overlapping, buffers, 2)  # programmatic, programmatic
    types = edge_types(graph)
    assert (len(types), sum(types)) == (9, 5)
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_errors_carry_the_launch(overlapping):
    x = torch.randn(4, device="cuda")
    with pytest.raises(RuntimeError, match=r"overlapping:step: launch failed .*block \(2048"):
        overlapping.launch("step", (1,), (2048,), (x, x, 4, 0))
    with pytest.raises(TypeError, match="argument 2 must be an int"):
        overlapping.launch("step", (1,), (32,), (x, x, 4.0, 0))


@pytest.mark.gpu
def test_a_new_thread_launches_first(overlapping):
    import threading

    buffers, out = pair("cuda"), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: out.append(chain(overlapping, buffers, 3)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out[0].cpu(), chain(overlapping, pair("cpu"), 3))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [PAIR, 132 * 256, 8 * 132 * 256])
def test_time_of_a_chain(overlapping, plain, n):
    """Microseconds a kernel, median of 9 replays of 500 kernels and of 9 chains on a stream."""
    count, times = 500, {}

    def median_us(run):
        spans = []
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spans.append(begin.elapsed_time(end) * 1e3 / count)
        return sorted(spans[1:])[4]

    def measure(name, program):
        buffers = pair("cuda", n)
        chain(program, buffers, 2, n=n)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(program, buffers, count, n=n)
        stream = median_us(lambda: chain(program, buffers, count, n=n))
        times[name] = median_us(graph.replay), stream

    measure("plain, PyCUDA", plain)
    with programmatic.without_overlap():
        measure("waiting, no attribute", overlapping)
    measure("waiting, overlapped", overlapping)
    for name, (graph_us, stream_us) in times.items():
        print(f"\n{n} elements, {name}: {graph_us:.3f} us in a graph, {stream_us:.2f} on a stream")
    assert times["waiting, overlapped"][0] <= 1.05 * times["waiting, no attribute"][0]
