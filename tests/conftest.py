"""Fixtures shared by all tests: fresh seeds (printed on failure), a private kernel cache."""

import os
import random
from collections.abc import Iterator

# Before torch starts its thread pool: two cores are shared by the test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for each test; MIRAGE_SEED repeats one. Failures print it."""
    value = int(os.environ.get("MIRAGE_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"MIRAGE_SEED={value}")
    return value


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
