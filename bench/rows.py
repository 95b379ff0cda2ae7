"""From a case to rows: draw inputs, check parity, time kernels beside peers, check parity again."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import Kernel, Op, ops
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.parity import Parity, exact_float32, in_float64, judge, poison

from . import composed, eight_bit, folded
from . import peers as peer_functions
from .case import Case, Draw
from .ceilings import bound_us
from .harness import FULL, MAX_CALLS, QUICK, Effort, Timing, measure

# Measured only when they are named: an interpreter's time says nothing of the kernel.
INTERPRETED = {"ptx-emulated": ("cpu",), "triton": ("cpu",)}
# Weights rotate through at least this much, 2.5 times the H200's 60 MB of L2.
ROTATED_BYTES = 150_000_000
STEP_SECONDS = 60.0  # a peer or a timing that takes longer hangs
KERNEL_SECONDS = 25.0  # a kernel's first call, NVRTC or Triton compiling it
COMPILE_SECONDS = 120.0

# begin(step, seconds): called before each step that could hang or crash the process.
Begin = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What to measure, as the command line says it; travels to the worker as JSON."""

    device: str = "cpu"
    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    quick: bool = False
    cold: bool = False
    preset: str = "tiny"
    size: tuple[int, int] = (64, 64)  # height, width of the model's frames
    steps: tuple[int, ...] = (1, 4)
    frames: int = 1000
    clip: str = ""
    compile_seconds: float = 240.0
    warm: bool = False  # compile everything first, in several processes
    tiles: int = 0  # candidates timed of each shape, in place of kernels beside peers
    save: str = ""  # the file that tiles are kept in as they are found
    deadline: float = float("inf")  # time.time() after which nothing new begins
    seed: int = 0

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL


@dataclass
class Outcome:
    """What one case gave."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    tiles: list[dict[str, Any]] = field(default_factory=list)  # of `mirage tune`


@dataclass
class Subject:
    """The inputs of a case, and what is true of them."""

    case: Case
    dtype: str
    args: tuple
    call: Call
    truth: Tensor
    plain: Tensor

    def judge(self, out: Tensor) -> Parity:
        found = judge(out, self.plain, self.truth)
        slack = eight_bit.ALLOWED.get(self.case.op, 0.0)
        allowed, largest = max(found.allowed, slack), max(found.max_allowed, 16 * slack)
        return replace(found, allowed=allowed, max_allowed=largest)

    @property
    def where(self) -> dict[str, str]:
        return {"op": self.case.op, "case": self.case.name, "dtype": self.dtype}


def measure_case(
    case: Case,
    dtype: str,
    limits: dict[str, Any],
    options: Options,
    begin: Begin = lambda step, seconds: None,
    lost: Sequence[str] = (),
) -> Outcome:
    """Check and time every kernel of the case's op beside its peers.

    Args:
        case: the op and the shape.
        dtype: torch's name of the dtype.
        limits: what ceilings.ceilings returned for this device.
        options: which backends and peers, hot or also cold, how long.
        begin: told the name of each risky step before it runs.
        lost: steps that hung or crashed in an earlier process: left out.

    Returns:
        A row for each kernel (and cache state); the kernels that failed parity, which are not
        timed; what was left out, with the reason.
    """
    outcome = Outcome()
    begin("inputs", STEP_SECONDS)
    subject = prepare(case, dtype, options)
    parities: dict[str, Parity] = {}
    kernels: dict[str, Kernel] = {}
    outputs: dict[str, Tensor] = {}
    for kernel in op_named(case.op).kernels:
        reason = left_out(kernel, subject.call, options, lost)
        if reason:
            outcome.skipped.append({**subject.where, "kernel": kernel.name, "reason": reason})
            continue
        begin(kernel.name, KERNEL_SECONDS)
        out, parity = first_run(kernel, subject)
        if out is None or not parity.passed:
            outcome.failures.append(_failure(subject, kernel, parity))
            continue
        kernels[kernel.name], parities[kernel.name], outputs[kernel.name] = kernel, parity, out
    if not kernels:
        return outcome
    wanted = _working_peers(subject, options, begin, lost, outcome)
    for cache in _cache_states(case, options):
        begin("timing", STEP_SECONDS)
        timings = _time(subject, kernels, wanted, cache, options.effort)
        peer_us = {name: timings[name].median_us for name in wanted}
        for name, kernel in kernels.items():
            after = _after(timings[name], outputs[name], subject)
            if after is not None and not after.passed:
                outcome.failures.append(_failure(subject, kernel, after, "after timing: "))
                continue
            row = _row(subject, kernel, timings[name], cache, parities[name], limits)
            outcome.rows.append({**row, "peers": peer_us})
    return outcome


def op_named(name: str) -> Op:
    """A registered op, or one of the benchmark's own."""
    own = composed.OPS | folded.OPS | eight_bit.OPS
    return own.get(name) or getattr(ops, name)


def prepare(case: Case, dtype: str, options: Options) -> Subject:
    """Draw the case's inputs, and compute what is true of them and what torch makes of them."""
    # A seed of its own for each case, the same in every run and every process.
    seed = options.seed + zlib.crc32(f"{case.op} {case.name} {dtype}".encode())
    args = case.make(Draw(options.device, getattr(torch, dtype), seed))
    op = op_named(case.op)
    with torch.no_grad(), exact_float32():
        truth = op.reference(*in_float64(args))
        plain = op.torch_kernel.run(*args)
    return Subject(case, dtype, args, op.describe(args, {}), truth, plain)


def left_out(kernel: Kernel, call: Call, options: Options, lost: Sequence[str] = ()) -> str | None:
    """Why this kernel is not measured on this call; None when it is."""
    if options.backends and kernel.backend not in options.backends:
        return "not asked for"
    if not options.backends and call.device.type in INTERPRETED.get(kernel.backend, ()):
        return "interpreted on a CPU, so its time says nothing; name it with --backend to measure"
    if kernel.name in lost:
        return "hung or crashed the process"
    return kernel.refuses(call)


def first_run(kernel: Kernel, subject: Subject) -> tuple[Tensor | None, Parity]:
    """The output on poisoned memory and its parity; a kernel that raises has failed."""
    try:
        with torch.no_grad():
            poison(subject.plain)
            out = kernel.run(*subject.args)
            if subject.call.device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # every backend has its own class for a launch that fails
        if subject.call.device.type == "cuda":
            torch.cuda.synchronize()  # raises when the context is lost: the worker must restart
        first_line = (str(error).splitlines() or [""])[0]
        note = f"raised {type(error).__name__}: {first_line}"
        return None, Parity(float("inf"), 0.0, float("inf"), 0.0, note)
    return out, subject.judge(out)


def _working_peers(
    subject: Subject, options: Options, begin: Begin, lost: Sequence[str], outcome: Outcome
) -> dict[str, Callable[..., Tensor]]:
    """The peers that run on these inputs; the others are noted with their reason."""
    working = {}
    functions = peer_functions.peers(subject.case, subject.args, options.peers)
    for name, function in functions.items():
        reason = "hung or crashed the process" if name in lost else None
        if reason is None:
            begin(name, COMPILE_SECONDS if name == "torch-compile" else STEP_SECONDS)
            try:
                with torch.no_grad():
                    function(*subject.args)
            except (RuntimeError, ValueError, TypeError) as error:
                first_line = (str(error).splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first_line[:200]}"
        if reason is None:
            working[name] = function
        else:
            outcome.skipped.append({**subject.where, "peer": name, "reason": reason})
    return working


def _cache_states(case: Case, options: Options) -> tuple[str, ...]:
    if not options.cold:
        return ("hot",)
    return ("hot", "cold-weights") if case.weights else ("hot", "cold")


def _time(
    subject: Subject,
    kernels: dict[str, Kernel],
    wanted: dict[str, Callable[..., Tensor]],
    cache: str,
    effort: Effort,
) -> dict[str, Timing]:
    """Kernels and peers in turn, on the inputs themselves or on rotating weights."""
    sets = _rotated(subject) if cache == "cold-weights" else [subject.args]
    runs = {**wanted, **{name: kernel.run for name, kernel in kernels.items()}}
    contenders = {
        name: [functools.partial(run, *args) for args in sets] for name, run in runs.items()
    }
    return measure(contenders, subject.call.device.type, cold=cache == "cold", effort=effort)


def _rotated(subject: Subject) -> list[tuple]:
    """Argument lists that differ in the storage of their weights, not in any value."""
    weights = [subject.args[i] for i in subject.case.weights]
    weight_bytes = sum(w.numel() * w.element_size() for w in weights)
    sets = [subject.args]
    while len(sets) * weight_bytes < ROTATED_BYTES and len(sets) < MAX_CALLS:
        args = list(subject.args)
        for i in subject.case.weights:
            args[i] = args[i].clone()
        sets.append(tuple(args))
    return sets


def _after(timing: Timing, first: Tensor, subject: Subject) -> Parity | None:
    """None when the timed output is the checked one bit for bit, else its own parity."""
    out = timing.output
    assert out is not None, "measure keeps the last output"
    if out.shape == first.shape and torch.equal(out, first):
        return None
    return subject.judge(out)


def _row(
    subject: Subject,
    kernel: Kernel,
    timing: Timing,
    cache: str,
    parity: Parity,
    limits: dict[str, Any],
) -> dict[str, Any]:
    case = subject.case
    time_us = timing.percentiles_us
    median_us = max(time_us["p50"], 1e-3)
    dtype = getattr(torch, subject.dtype)
    bytes_moved = case.bytes_moved(dtype)
    return {
        **subject.where,
        "backend": kernel.backend,
        "time_us": time_us,
        "tflops": case.flops_in(dtype) / median_us * 1e-6,  # FLOP/us = MFLOP/s
        "gbps": bytes_moved / median_us * 1e-3,  # B/us = MB/s
        "fraction_of_ceiling": bound_us(case, subject.dtype, limits) / median_us,
        "peers": {},
        "parity": {
            "error": parity.error,
            "allowed": parity.allowed,
            "max_error": parity.max_error,
            "max_allowed": parity.max_allowed,
        },
        "kernel": kernel.name,
        "cache": cache,
        "layout": case.layout,
        "label": subject.call.label,
        "how": timing.how,
        "calls": timing.calls,
        "flops": case.flops_in(dtype),
        "bytes": bytes_moved,
        "samples_us": [round(sample, 4) for sample in timing.samples_us],
    }


def _failure(subject: Subject, kernel: Kernel, parity: Parity, when: str = "") -> dict[str, Any]:
    return {
        **subject.where,
        "backend": kernel.backend,
        "kernel": kernel.name,
        "reason": f"{when}{parity}",
    }
