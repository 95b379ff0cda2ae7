"""Fixtures shared by all tests: fresh seeds (printed on failure), a private kernel cache."""

import contextvars
import os
import random
from collections.abc import Iterator

# Before torch starts its thread pool: two cores are shared by the test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# This project's context variables, by name: set within a block and gone after it.
OWN = {"policy", "fused backend", "ways of layers", "fp8 maxima", "fused hashes", "watcher"}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for each test; MIRAGE_SEED repeats one. Failures print it."""
    value = int(os.environ.get("MIRAGE_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"MIRAGE_SEED={value}")
    return value


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """A test that leaves a setting of its thread changed would change the bits of those after it:
    their own threads start without it."""
    before = _settings()
    yield
    changed = {
        name: (before[name], now) for name, now in _settings().items() if now != before[name]
    }
    assert not changed, f"the test leaves settings changed (before, now): {changed}"


def _settings() -> dict[str, object]:
    """What torch and this project keep for a thread or a process and results depend on."""
    backends, precision = torch.backends, torch.get_float32_matmul_precision()
    smallest = torch.full((64,), 1e-40)  # a denormal: 0 where they are flushed
    variables = contextvars.copy_context().items()
    return {
        "context variables": {v.name: repr(value) for v, value in variables if v.name in OWN},
        "threads": torch.get_num_threads(),
        "gradient": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32": (precision, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "denormals flushed": not (smallest * 1.0).any().item(),
        "modes": (len(_get_current_dispatch_mode_stack()), torch._C._len_torch_function_stack()),
    }


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels are built into a cache of this run, unless MIRAGE_CACHE names one."""
    os.environ.setdefault("MIRAGE_CACHE", str(tmp_path_factory.mktemp("kernel-cache")))


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SaysFailuresAtOnce())


class SaysFailuresAtOnce:
    """On a GPU a kernel that hangs may end the run before pytest's own summary."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            text = "\n    ".join(line[:300] for line in lines[:4] or [report.longreprtext[-300:]])
            print(f"\nFAILED {report.nodeid} ({report.duration:.1f} s)\n    {text}", flush=True)


@pytest.fixture(autouse=True)
def lost_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that ended the CUDA context must not fail the tests after it.

    xdist starts another process in place of one that ends, and reports the test that it was in.
    """
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)
        pytest.exit(f"{request.node.nodeid} ended the CUDA context: {error}", returncode=70)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always; the GPU under `pytest -m gpu`."""
    return torch.device(request.param)


@pytest.fixture
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a linear take several tiles each, so that the ring and the turns go round."""
    monkeypatch.setattr("mirage_hello.kernels.linear_tile.MULTIPROCESSORS", 2)
