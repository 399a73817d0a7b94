"""The C kernels on processors that this machine is not, held to the kernels' own tests.

    python -m tests.kernels.processors [NAME …]

compiles every library for each processor of the table, or for those named, and runs the tests of the kernels with what
this machine can execute: by itself, or through QEMU's user mode where the instructions are another machine's. On Debian
that needs, for ARM on an x86:

    apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

`build.library` is replaced by a stand-in. Each call of its functions is a process of its own, a program of `driver.c`
and the library. How to call comes from the caller's own declarations (`argtypes`, `restype`), so that a new function
needs nothing here; and a function that is declared and that no test calls is an error. A pointer stands for the tensor
whose `data_ptr()` gave it: all of its memory goes with the call and comes back changed, and the driver lets nobody read
or write beyond it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import platform
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.kernels import build

HERE = Path(__file__).parent
KERNELS = Path(build.__file__).parent
LIBRARIES = sorted({path.parent.name for path in KERNELS.glob("*/native.c")} - {"gram"})
"""All but gram, which is for processors with AVX-512 BF16 alone; others sum in torch."""
FOLDER = HERE.parent.parent / ".pytest_cache" / "processors"
"""Where the programs are kept."""
SECONDS = 300
"""For a compilation, and for a call."""


@dataclass(frozen=True)
class Processor:
    """What to compile for, and whether it can be executed here."""

    machine: str
    """As `platform.machine()` calls the architecture."""
    flags: str
    """For the compiler."""
    stands_for: str
    needs: str
    """Names that Linux has for what a machine of the architecture must have."""

    @property
    def foreign(self) -> bool:
        return self.machine != platform.machine()

    def compiler(self) -> list[str]:
        """The command; empty where there is none."""
        if not self.foreign:
            found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        else:
            found = shutil.which(f"{self.machine}-linux-gnu-gcc")
        return [found] if found else []

    def emulator(self) -> list[str]:
        """What runs a program of another architecture."""
        return [f"qemu-{self.machine}", "-cpu", "max"] if self.foreign else []

    def hindrance(self) -> str | None:
        """Why nothing can be run here, or None."""
        if not self.compiler():
            return "no compiler"
        if self.foreign:
            return None if shutil.which(self.emulator()[0]) else f"no {self.emulator()[0]}"
        missing = sorted(set(self.needs.split()) - build.features())
        return f"this machine has no {', '.join(missing)}" if missing else None


_AVX2 = "avx2 fma f16c bmi2"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512vl avx512dq avx512cd"
_BYTES = f"{_AVX512} avx512_vnni avx512vbmi avx512_vbmi2 gfni"

PROCESSORS = {
    "x86-64": Processor("x86_64", "-march=x86-64", "any x86: plain C", "sse2"),
    "haswell": Processor("x86_64", "-march=haswell", "Intel with AVX2", _AVX2),
    "znver3": Processor("x86_64", "-march=znver3", "AMD with AVX2 only", f"{_AVX2} vaes vpclmulqdq"),
    "alderlake": Processor("x86_64", "-march=alderlake", "AVX2 with byte products", f"{_AVX2} avx_vnni gfni vaes"),
    "skylake-avx512": Processor("x86_64", "-march=skylake-avx512", "AVX-512, no byte products", _AVX512),
    "cascadelake": Processor("x86_64", "-march=cascadelake", "and byte products", f"{_AVX512} avx512_vnni"),
    "icelake-server": Processor("x86_64", "-march=icelake-server", "and byte shuffles, GFNI", _BYTES),
    "znver4": Processor(
        "x86_64", "-march=icelake-server -mavx512bf16", "AMD with AVX-512: and bfloat16", f"{_BYTES} avx512_bf16"
    ),
    "sapphirerapids": Processor(
        "x86_64", "-march=sapphirerapids", "Intel with AMX", f"{_BYTES} avx512_bf16 avx512_fp16 amx_bf16 amx_int8"
    ),
    "armv8": Processor("aarch64", "-march=armv8-a", "any 64-bit ARM: NEON", "asimd"),
    "armv8.2": Processor(
        "aarch64", "-march=armv8.2-a+fp16+dotprod", "NEON with byte products", "asimd asimddp asimdhp"
    ),
    "neoverse-v1": Processor("aarch64", "-mcpu=neoverse-v1", "ARM servers: SVE, bfloat16", "sve bf16 i8mm asimddp"),
}


class Memory:
    """The storages that pointers were asked of, kept while a call may use them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        asked = torch.Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage
            return asked(tensor)

        patch.setattr(torch.Tensor, "data_ptr", data_ptr)

    def find(self, pointer: int) -> tuple[int, int]:
        """The storage that the pointer points into: where it begins, and its length."""
        for begin, storage in self.storages.items():
            if begin <= pointer < begin + storage.nbytes():
                return begin, storage.nbytes()
        raise AssertionError(f"a pointer to {pointer:#x}, which is in no tensor whose data_ptr() was asked for")


class Library:
    """Stands in for the loaded library `name`: attributes are functions, on which callers set `argtypes`, `restype`."""

    def __init__(self, name: str, processor: Processor, options: Sequence[str], memory: Memory) -> None:
        self._name, self._processor, self._options, self._memory = name, processor, options, memory
        self._program: Path | None = None

    def __getattr__(self, name: str) -> Function:
        if name.startswith("_"):
            raise AttributeError(name)
        function = Function(self, name)
        setattr(self, name, function)
        return function

    def functions(self) -> list[Function]:
        """Those that a caller has declared."""
        return [each for each in vars(self).values() if isinstance(each, Function)]

    def forget(self) -> None:
        """Lets go of the tensors of earlier calls."""
        self._memory.storages.clear()

    def compile(self) -> Path:
        """The program that calls the functions declared so far. Raises AssertionError with the compiler's words."""
        if self._program is None:
            self._program = self._compile()
        return self._program

    def _compile(self) -> Path:
        native = KERNELS / self._name / "native.c"
        calls = f'#include "{native}"\n#include "{HERE / "driver.h"}"\n\n' + _calls(self.functions())
        taken = [*sorted(KERNELS.glob("*.h")), *sorted(native.parent.glob("*.[ch]")), *sorted(HERE.glob("driver.[ch]"))]
        flags = [flag for flag in build._FLAGS if flag not in ("-fPIC", "-shared")]
        command = [*self._processor.compiler(), *flags, *self._processor.flags.split(), "-fopenmp", *self._options]
        command += ["-static"] if self._processor.foreign else []
        parts = [repr(command).encode(), calls.encode(), *(path.read_bytes() for path in taken)]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        FOLDER.mkdir(parents=True, exist_ok=True)
        program = FOLDER / f"{self._name}-{digest}"
        if not program.exists():
            source, made = program.with_suffix(".c"), program.with_suffix(".new")
            source.write_text(calls)
            command += ["-o", str(made), str(source), str(HERE / "driver.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            made.replace(program)
        return program

    def call(self, function: Function, values: Sequence[Any]) -> Any:
        message = _Message(self._memory)
        for declared, value in zip(function.argtypes, values, strict=True):
            message.add_argument(declared, value)
        command = [*self._processor.emulator(), str(self.compile())]
        given = message.encode(function.name)
        done = subprocess.run(command, input=given, capture_output=True, timeout=SECONDS)
        if done.returncode:
            code = -done.returncode
            how = signal.Signals(code).name if code > 0 else f"status {done.returncode}"
            where = "; it read or wrote beyond a tensor, perhaps" if code == signal.SIGSEGV else ""
            raise AssertionError(f"{self._name}.{function.name} ended with {how}{where} {done.stderr.decode()}")
        return function.result(*message.decode(done.stdout))


@dataclass
class Function:
    """As ctypes has it."""

    library: Library
    name: str
    argtypes: Sequence[Any] = ()
    restype: Any = ctypes.c_int
    calls: int = 0

    def __call__(self, *values: Any) -> Any:
        self.calls += 1
        return self.library.call(self, values)

    def result(self, number: int, real: float) -> Any:
        if self.restype is None:
            return None
        return self.restype(real if self.restype in _REALS else number).value


_REALS = (ctypes.c_float, ctypes.c_double)


def _calls(functions: Sequence[Function]) -> str:
    """The C function that calls them by name."""
    lines = ["int call(const char *name, const Argument *a, Argument *result) {", "    (void)a, (void)result;"]
    for each in functions:
        fields = ["real" if kind in _REALS else "number" if _is_number(kind) else "pointer" for kind in each.argtypes]
        arguments = ", ".join(f"a[{i}].{name}" for i, name in enumerate(fields))
        to = "" if each.restype is None else f"result->{'real' if each.restype in _REALS else 'number'} = "
        lines.append(f'    if (!strcmp(name, "{each.name}")) return {to}{each.name}({arguments}), 1;')
    return "\n".join([*lines, "    return 0;", "}", ""])


def _is_number(kind: Any) -> bool:
    return kind is not ctypes.c_void_p and issubclass(kind, ctypes._SimpleCData)


@dataclass
class _Message:
    """What driver.c reads."""

    memory: Memory
    buffers: list[bytes] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)  # where one begins -> its buffer
    pointers: list[tuple[int, int, int, int]] = field(default_factory=list)
    arguments: list[tuple[int, bytes]] = field(default_factory=list)

    def add_argument(self, declared: Any, value: Any) -> None:
        if isinstance(value, ctypes.Structure):
            self.arguments.append((2, struct.pack("<qq", self._structure(value), 0)))
        elif declared in _REALS:
            self.arguments.append((1, struct.pack("<dq", declared(value).value, 0)))
        elif _is_number(declared):
            self.arguments.append((0, struct.pack("<qq", declared(value).value, 0)))
        elif value:
            self.arguments.append((2, struct.pack("<qq", *self._place(value))))
        else:
            self.arguments.append((0, bytes(16)))

    def _place(self, pointer: int) -> tuple[int, int]:
        begin, length = self.memory.find(pointer)
        if begin not in self.storages:
            self.storages[begin] = len(self.buffers)
            self.buffers.append(ctypes.string_at(begin, length))
        return self.storages[begin], pointer - begin

    def _structure(self, value: ctypes.Structure) -> int:
        at = len(self.buffers)
        self.buffers.append(bytes(value))
        for name, kind, *_ in value._fields_:
            if kind is ctypes.c_void_p and (pointer := getattr(value, name)):
                self.pointers.append((at, getattr(type(value), name).offset, *self._place(pointer)))
        return at

    def encode(self, name: str) -> bytes:
        lengths = [len(each) for each in self.buffers]
        counts = [len(self.buffers), len(self.pointers), len(self.arguments), *lengths]
        pointers = b"".join(struct.pack("<4q", *each) for each in self.pointers)
        arguments = b"".join(struct.pack("<q", kind) + value for kind, value in self.arguments)
        head = name.encode().ljust(64, b"\0") + struct.pack(f"<{len(counts)}q", *counts)
        return b"".join([head, *self.buffers, pointers, arguments])

    def decode(self, reply: bytes) -> tuple[int, float]:
        """Writes what has changed, and returns the result."""
        number, real = struct.unpack_from("<qd", reply)
        at = 16
        begins = {buffer: begin for begin, buffer in self.storages.items()}
        for i, before in enumerate(self.buffers):
            after = reply[at : at + len(before)]
            at += len(before)
            if i in begins and after != before:  # what is only read may lie in a file
                ctypes.memmove(begins[i], after, len(after))
        assert at == len(reply), (at, len(reply))
        return number, real


@contextmanager
def libraries_for(processor: Processor, *options: str) -> Iterator[dict[str, Library]]:
    """In the block the kernels are those of the processor."""
    with pytest.MonkeyPatch.context() as patch:
        memory = Memory(patch)
        libraries = {name: Library(name, processor, options, memory) for name in LIBRARIES}
        patch.setattr(build, "library", libraries.get)
        callers = [_caller(name) for name in LIBRARIES]
        for caller in callers:
            caller.cache_clear()
        try:
            for caller in callers:
                caller()  # declares the functions
            yield libraries
        finally:
            for caller in callers:
                caller.cache_clear()


def _caller(name: str) -> Any:
    """The cached function that loads the library and declares its functions."""
    package = f"llmtools.kernels.{name}"
    module = import_module(f"{package}.native" if find_spec(f"{package}.native") else package)
    return getattr(module, "library", None) or module._library


def uncalled(libraries: dict[str, Library]) -> list[str]:
    return [f"{name}.{each.name}" for name in libraries for each in libraries[name].functions() if not each.calls]


# ---- as a plugin of pytest: -p tests.kernels.processors --processor NAME ---------------------------------------------

_installed = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processor", choices=PROCESSORS, help="run the C kernels as compiled for this one")


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--processor"):
        manager = libraries_for(PROCESSORS[name])
        config.stash[_installed] = manager, manager.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    if installed := config.stash.get(_installed, None):
        installed[0].__exit__(None, None, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if installed := item.config.stash.get(_installed, None):
        for each in installed[1].values():
            each.forget()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (installed := session.config.stash.get(_installed, None)) and uncalled(installed[1]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if installed := config.stash.get(_installed, None):
        counts = {f"{name}.{f.name}": f.calls for name, each in installed[1].items() for f in each.functions()}
        terminalreporter.write_line("calls: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        if missing := uncalled(installed[1]):
            terminalreporter.write_line(f"no test calls {', '.join(missing)}")


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROCESSORS)}; all by default")
    names = parser.parse_args().names or list(PROCESSORS)
    if unknown := set(names) - set(PROCESSORS):
        parser.error(f"{', '.join(sorted(unknown))}: no such processor; there are {', '.join(PROCESSORS)}")
    rows = [(name, *_check(name)) for name in names]
    print("\n| processor | stands for | compiled with | kernels' tests |\n|---|---|---|---|")
    for name, _, verdict in rows:
        print(f"| {name} | {PROCESSORS[name].stands_for} | `{PROCESSORS[name].flags}` | {verdict} |")
    sys.exit(not all(passed for _, passed, _ in rows))


def _check(name: str) -> tuple[bool, str]:
    """Whether nothing is wrong, and what was found."""
    processor = PROCESSORS[name]
    print(f"\n== {name}", flush=True)
    if not processor.compiler():
        return True, "not compiled: no compiler"
    with libraries_for(processor) as libraries:
        try:
            for each in libraries.values():
                each.compile()
        except AssertionError as error:
            print(error)
            return False, "not compiled: an error"
    if reason := processor.hindrance():
        return True, f"compiled, not run: {reason}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.processors", "--processor", name]
    command += ["-m", "not slow and not gpu", "--ignore-glob=*/test_build.py", "--ignore-glob=*/test_triton.py"]
    command += ["--ignore-glob=*/test_processors.py", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(command, cwd=HERE.parent.parent, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    summary = done.stdout.strip().splitlines()[-1].partition(" in ")[0]
    return done.returncode == 0, summary + (f", in {processor.emulator()[0]}" if processor.foreign else "")


if __name__ == "__main__":
    main()
