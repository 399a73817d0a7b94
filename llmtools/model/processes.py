"""Several processes that quantize one model together, started by torchrun or accelerate.

The calibration sequences are divided among them, and each runs its own through the blocks. What is summed over tokens,
such as a Hessian, is summed over the processes, too; the linears that share it are divided among them, and each packed
layer is sent to the others. So all of them hold the same bits, and those are what one process makes, up to the order of
float32 sums.

Before each exchange the processes tell one another whether they are well. An error of one is so the error of all, and
the first process says it. One that is killed is noticed by its closed connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import InputError
from ..ranks import local_rank, on_one_machine, processes, processes_here, rank
from ..signals import Request, Stopped, deferred

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Time that a process waits for the others, which may be at a large layer; a dead one is noticed at once."""
_FAREWELL = timedelta(seconds=5)
"""Time that a process whose connections closed waits for a sign of the first one."""
_SIGN = "llmtools/first process ends"
"""Key of that sign in the store."""


class Processes:
    """One process, which does all of the work."""

    count, rank = 1, 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items. Raises InputError where there are fewer than processes."""
        if len(items) < self.count:
            raise InputError(
                f"too few calibration sequences for {self.count} processes: {len(items)}; give more text, or start "
                f"{len(items)} of them"
            )
        return items[self.rank :: self.count]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The process that does each of these works: the largest first, each to the one with the least so far."""
        load, owners = [0.0] * self.count, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            owners[index] = load.index(min(load))
            load[owners[index]] += costs[index]
        return owners

    def wait(self) -> None:
        """Waits until every process has come here. Raises the error of one that failed."""

    def gathered(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        return [value]

    def add_up(self, tensor: Tensor) -> None:
        """Replaces a tensor of any shape by its sum over the processes, which is the same bits in all of them."""

    def sent(self, value: Any, source: int) -> Any:
        """The value of the process `source`; others may give None."""
        return value

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Fills a tensor of any shape and dtype with the values of the process `source`."""


class _Failure(NamedTuple):
    """Why a process ends, as the others hear it."""

    kind: str
    """"stopped" for a signal, "input" for what the user can correct, "bug" for anything else."""
    text: str
    """Message in one line."""
    exit_code: int = 0
    """Exit code after a signal."""

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, KeyboardInterrupt):
            return cls("stopped", str(error), int(getattr(error, "exit_code", 130)))
        kind = "input" if isinstance(error, InputError | OSError | ImportError | MemoryError) else "bug"
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        return cls(kind, text if kind == "input" else f"{type(error).__name__}: {text}")

    def error(self, number: int) -> BaseException:
        """The error that this is in another process than `number`, where it happened."""
        if self.kind == "stopped":
            return Stopped("", self.exit_code)
        return (InputError if self.kind == "input" else RuntimeError)(f"{self.text} (in process {number})")


class Together(Processes):
    """A process of several."""

    def __init__(self, store: Any) -> None:
        """store: torch.distributed's, of the run."""
        import torch
        import torch.distributed as dist

        self.rank, self.count, self._store = rank(), processes(), store
        self.ended = False
        """Whether the others know that this process fails, or cannot be reached."""
        self._cause: Exception | None = None
        """Why this process ends, where another one ended without a word."""
        self._control: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._devices: Any = None
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
            if all(self.gathered(processes_here() <= torch.cuda.device_count())):  # nccl wants one for each
                self._devices = dist.new_group(backend="nccl", timeout=_PATIENCE)

    def wait(self) -> None:
        with self._meeting():
            pass

    def gathered(self, value: T) -> list[T]:
        with self._meeting():
            return self._gathered(value)

    def add_up(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        with self._meeting(), self._reachable(tensor) as (moved, group):
            dist.all_reduce(moved, group=group)

    def sent(self, value: T, source: int) -> T:
        import torch.distributed as dist

        values = [value]
        with self._meeting():
            dist.broadcast_object_list(values, src=source, group=self._control)
        return values[0]

    def copy_from(self, tensor: Tensor, source: int) -> None:
        import torch
        import torch.distributed as dist

        if not tensor.numel():
            return
        with self._meeting(), self._reachable(tensor) as (moved, group):
            dist.broadcast(moved.view(-1).view(torch.uint8), src=source, group=group)

    @contextmanager
    def _reachable(self, tensor: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """A tensor of these values in contiguous memory, and a group that can exchange it; then its values are those
        of `tensor`."""
        there = self._devices is not None and tensor.is_cuda
        moved = (tensor if there else tensor.cpu()).contiguous()
        yield moved, self._devices if there else self._control
        if moved is not tensor:
            tensor.copy_(moved)

    def _gathered(self, value: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._control)
        return found

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """For an exchange of all processes, which no signal interrupts; raises the error of one that failed."""
        request = Request()
        with deferred(request):
            try:
                failures: list[_Failure | None] = self._gathered(None)
                if not any(failures):
                    yield
            except RuntimeError as error:
                self.ended = True
                raise self._lost() from error
        for number, failure in enumerate(failures):
            if failure is not None:
                self.ended = True
                raise failure.error(number)
        if request.number is not None:
            raise Stopped(exit_code=request.exit_code)

    def _lost(self) -> Exception:
        """The error where another process ended without a word. The first one says it, if it lives."""
        text = "another process of this run ended; start it again, with --resume where finished blocks are kept"
        self._cause = InputError(text) if self.is_first else ConnectionError(text)
        with suppress(Exception):
            if self.is_first:
                self._store.set(_SIGN, "1")
            else:
                self._store.wait([_SIGN], _FAREWELL)
                self._cause = InputError(text)
        return self._cause

    def fail(self, error: BaseException) -> BaseException:
        """Tells the others of an error, which the first process says; returns the one to raise."""
        failure = _Failure.of(error)
        if failure.kind == "stopped" and self._cause is not None:
            return self._cause  # torchrun stops the others after one that was killed, wherever they are by then
        if not self.ended:
            self.ended = True
            try:
                self._gathered(failure)
            except RuntimeError:
                return self._lost() if failure.kind == "stopped" else error
            if not self.is_first and failure.kind == "input" and on_one_machine():
                error = InputError(failure.text)
        return error

    def wait_for_the_first(self) -> None:
        """Waits until the first process has ended: it never comes, and its connection closes."""
        import torch.distributed as dist

        if not self.is_first:
            with suppress(RuntimeError):
                dist.barrier(group=self._control)


@contextmanager
def together() -> Iterator[Processes]:
    """The processes of this run, for the length of the context; one by itself where torchrun started no others.

    All of them leave the context together: at the end of the work, or when one fails.
    """
    if processes() == 1:
        yield Processes()
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, owned = None, not dist.is_initialized()
    if owned:
        store, number, count = next(iter(rendezvous("env://")))
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=_PATIENCE)
    group = Together(store)
    try:
        yield group
        group.wait()
    except BaseException as error:
        with deferred(Request()):  # torchrun ends all processes as soon as one has failed
            found = group.fail(error)
            if owned:
                group.wait_for_the_first()
                dist.destroy_process_group()
        if found is error:
            raise
        raise found from error
    if owned:
        dist.destroy_process_group()
