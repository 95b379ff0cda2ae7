"""The benchmark cases under pytest-benchmark: small shapes, each checked before it is timed.

The same cases, inputs and parity rule as `mirage bench`; `--benchmark-only` prints the table.
"""

import pytest
import torch

from mirage_hello.bench import peers, worker
from mirage_hello.bench.case import PEERS
from mirage_hello.bench.rows import INTERPRETED, Options, left_out, prepare
from mirage_hello.kernels import ops

OPTIONS = Options(device="cpu")
CASES = [case for case, _ in worker.cases(OPTIONS)]
CASE_IDS = [f"{case.op} {case.name}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_speed(case, benchmark):
    subject = prepare(case, "float32", OPTIONS)
    runnable = [k for k in getattr(ops, case.op).kernels if not left_out(k, subject.call, OPTIONS)]
    kernel = min(runnable, key=lambda k: k.backend == "torch")  # ours where one runs on a CPU
    with torch.no_grad():
        parity = subject.judge(kernel.run(*subject.args))
        assert parity.passed, f"{kernel.name}: {parity}"
        out = benchmark.pedantic(kernel.run, subject.args, rounds=5, iterations=2, warmup_rounds=1)
    assert subject.judge(out).passed, "the timed output differs from the checked one"
    benchmark.extra_info.update(subject.where, kernel=kernel.name, error=parity.error)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_a_peer_computes_the_op(case):
    """Beating a function that computes something else would be no feat."""
    subject = prepare(case, "float32", OPTIONS)
    out = peers.EAGER[case.op](*subject.args)
    parity = subject.judge(out)
    assert parity.error <= max(parity.allowed, 1e-6), parity


def test_every_op_has_cases_and_a_peer():
    names = {op.name for op in ops}
    assert names == {case.op for case in CASES} == set(peers.EAGER)


def test_cases_name_known_peers():
    assert {peer for case in CASES for peer in case.peers} <= set(PEERS)
    assert set(INTERPRETED) == {"ptx-emulated", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("group", worker.CASES)
def test_every_peer_of_a_quick_case_runs_on_the_gpu(group):
    options = Options(device="cuda", quick=True, peers=PEERS)
    for case, dtype in worker.cases(options, group):
        subject = prepare(case, dtype, options)
        wanted = tuple(name for name in PEERS if name != "torch-compile")
        functions = peers.peers(case, subject.args, wanted)
        for name, function in functions.items():
            out = function(*subject.args)
            if name != "copy":
                error = (out.double() - subject.truth.double()).norm() / subject.truth.double().norm()
                assert error < 2e-2, (case.op, case.name, name)
