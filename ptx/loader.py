"""Programs: hand-written PTX and CUDA C++, loaded by PyCUDA and launched on torch tensors.

A kernel that executes griddepcontrol.wait goes through `programmatic` instead of PyCUDA.

    program = loader.program("silu", dtype="bf16")
    program.launch("silu_bf16", grid=(g, 1, 1), block=(256, 1, 1), args=(x, y, n))

The same call on CPU tensors runs the PTX in the emulator.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mirage_hello.ptx import assembler, context, cubin, programmatic, signature
from mirage_hello.ptx.tensor_map import TensorMap, im2col_map, tensor_map

__all__ = ["Program", "TensorMap", "cuda_program", "im2col_map", "program", "tensor_map"]

STATIC_SMEM_LIMIT = 48 * 1024  # more dynamic shared memory must be asked for, per function
_load_lock = threading.RLock()
_watcher: ContextVar[Callable[..., None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Callable[..., None]) -> Iterator[None]:
    """Within the block, on this thread, each launch first calls
    watcher(program's name, entry, grid, block, args, smem_bytes)."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def device_arch(device: int) -> str:
    """Architecture to compile for: with the `a` features from compute capability 9.0 on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def program(name: str, **variables: Any) -> "Program":
    """The program of `ptx/<name>.ptx`, or of `ptx/<name>.ptx.j2` rendered with these variables.

    The same arguments give the same object. Nothing is compiled before the first launch.

    Raises:
        FileNotFoundError: no such source.
    """
    return Program(name, assembler.render(name, **variables))


def cuda_program(name: str, defines: dict[str, str] | None = None) -> "Program":
    """The program of `kernels/cuda/<name>.cu` with these macros; entries are extern "C"."""
    return _cuda_program(name, tuple(sorted((defines or {}).items())))


@functools.cache
def _cuda_program(name: str, defines: tuple[tuple[str, str], ...]) -> "Program":
    assembler.cuda_source(name)
    return Program(name, None, defines)


class Program:
    """One source: PTX text (`text`), or CUDA C++ (`text` is None) with macros."""

    def __init__(
        self, name: str, text: str | None, defines: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.name, self.text, self.defines = name, text, defines
        self._functions: dict[tuple[str, int], Function] = {}

    def compile(self, arch: str) -> bytes:
        """The cubin for `arch`, from the disk cache where it has it."""
        if self.text is None:
            return assembler.compile_cuda(self.name, arch, self.defines)
        return assembler.assemble(self.text, arch, self.name)

    def ptx(self, arch: str) -> str:
        """The PTX text; of a CUDA source, what NVRTC makes of it."""
        if self.text is None:
            return assembler.compile_cuda(self.name, arch, self.defines, "ptx").decode()
        return self.text

    @functools.cached_property
    def parsed(self) -> Any:
        """The PTX as the emulator's module."""
        from mirage_hello.ptx import emulator

        if self.text is None:
            raise context.DriverError(
                f"{self.name}.cu: CUDA C++ needs a CUDA device (got CPU tensors); the emulator "
                "runs PTX only"
            )
        return emulator.parse(self.text, name=f"{self.name}.ptx")

    def launch(
        self,
        entry: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        smem_bytes: int = 0,
    ) -> None:
        """Queue the kernel on torch's current stream (CUDA tensors), or emulate it (CPU tensors).

        Args:
            entry: name of the kernel in the source.
            grid, block: blocks and threads, up to three sizes.
            args: in parameter order: tensors (passed as pointers), TensorMap, None (a null
                pointer), int and float (converted to the parameter's size).
            smem_bytes: dynamic shared memory of a block.

        Raises:
            DriverError: no driver or no PyCUDA. CompileError: the compiler refuses the source.
            TypeError: the arguments do not fit the kernel's parameters.
            RuntimeError: the launch fails; the text has the kernel, its dimensions and the device.
        """
        if (watcher := _watcher.get()) is not None:
            watcher(self.name, entry, grid, block, args, smem_bytes)
        first = next(a for a in args if isinstance(a, Tensor | TensorMap))
        device = (first if isinstance(first, Tensor) else first.tensor).get_device()
        if device < 0:
            from mirage_hello.ptx import emulator

            emulator.launch(self.parsed, entry, tuple(grid), tuple(block), list(args), smem_bytes)
            return
        self.function(entry, device).launch(grid, block, args, smem_bytes)

    def function(self, entry: str, device: int) -> "Function":
        """The loaded kernel on a device; compiled and loaded at the first use there."""
        found = self._functions.get((entry, device))
        if found is None:
            context.pycuda_driver()  # says what is missing, before anything is compiled
            with _load_lock:
                arch = device_arch(device)
                code = self.compile(arch)
                text = self.ptx(arch)
                codes = signature.parameter_codes(text, entry)
                formats = signature.launch_format(cubin.params(code, entry), codes)
                kind = DependentFunction if programmatic.waits(text, entry) else Function
                name = f"{self.name}:{entry}"
                found = kind(name, entry, code, device, codes, formats)
                self._functions[(entry, device)] = found
        return found


class Function:
    """A kernel on one device, loaded and launched by PyCUDA."""

    def __init__(
        self, name: str, entry: str, code: bytes, device: int, codes: Sequence[str], formats: list
    ) -> None:
        self.name, self.device = name, device
        self._convert = signature.converters(codes)
        self._smem_bytes = STATIC_SMEM_LIMIT
        with context.active(device) as driver:
            self._load(driver, code, entry, formats)

    def _load(self, driver: Any, code: bytes, entry: str, formats: list[str]) -> None:
        module = driver.module_from_buffer(code)
        context.keep(module)
        self._raw = module.get_function(entry)
        self._raw.prepare(formats)

    def launch(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], smem_bytes: int
    ) -> None:
        """See Program.launch."""
        values = self.values(args)
        if smem_bytes > self._smem_bytes:
            with context.active(self.device) as driver:
                self._allow_smem(driver, smem_bytes)
            self._smem_bytes = smem_bytes
        grid3, block3 = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        with torch.cuda.device(self.device):
            try:
                self._queue(grid3, block3, smem_bytes, values)
            except (context.pycuda_driver().Error, programmatic.LaunchError) as error:
                raise RuntimeError(
                    f"{self.name}: launch failed with {error} (grid {grid3}, block {block3}, "
                    f"{smem_bytes} B shared, {torch.cuda.get_device_name(self.device)})"
                ) from error

    def values(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as the launch buffer takes them. TypeError names the one that is wrong."""
        if len(args) != len(self._convert):
            raise TypeError(f"{self.name}: takes {len(self._convert)} arguments (got {len(args)})")
        try:
            return [convert(a) for convert, a in zip(self._convert, args, strict=True)]
        except TypeError:
            for i, (convert, a) in enumerate(zip(self._convert, args, strict=True)):
                try:
                    convert(a)
                except TypeError as error:
                    raise TypeError(f"{self.name}: argument {i} {error}") from None
            raise

    def _queue(self, grid: tuple, block: tuple, smem_bytes: int, values: list[Any]) -> None:
        with context.launch_stream(self.device) as stream:
            self._raw.prepared_async_call(grid, block, stream, *values, shared_size=smem_bytes)

    def _allow_smem(self, driver: Any, smem_bytes: int) -> None:
        which = driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._raw.set_attribute(which, smem_bytes)


class DependentFunction(Function):
    """A kernel that waits for the one before it by itself, and so may start before that ends."""

    def _load(self, driver: Any, code: bytes, entry: str, formats: list[str]) -> None:
        self._dependent = programmatic.Function(code, entry, formats)

    def _queue(self, grid: tuple, block: tuple, smem_bytes: int, values: list[Any]) -> None:
        stream = torch.cuda.current_stream(self.device)
        self._dependent.launch(grid, block, smem_bytes, stream, values)

    def _allow_smem(self, driver: Any, smem_bytes: int) -> None:
        self._dependent.allow_smem(smem_bytes)
