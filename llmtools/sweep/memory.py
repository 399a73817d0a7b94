"""The peak memory of a finetuning run, measured by a callback of the Trainer.

On a GPU it is the allocator's peak over the run. On a CPU it is the bytes of all persistent tensors (weights, adapters,
optimizer state) plus the peak of what the second step allocates, from the profiler's memory events. A process's
resident memory would say less about a small model: loading libraries changes it by megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def meter() -> Any:
    """A TrainerCallback; after training it has `model_bytes`, `peak_bytes` and `device`."""
    import torch
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()

    class Meter(TrainerCallback):
        device = torch.cuda.get_device_name() if gpu else "cpu"
        """Name of the GPU, or "cpu"."""
        model_bytes = 0
        """Bytes of all frozen tensors: packed weights with their scales, embeddings, norms."""
        peak_bytes = 0
        """Bytes at the peak of a training step."""
        _profile: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.model_bytes = bytes_of(tensor for tensor in tensors_of(model) if not tensor.requires_grad)
            if gpu:
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
        ) -> None:
            if gpu or state.global_step != min(1, state.max_steps - 1):
                return
            states = (value for entry in optimizer.state.values() for value in entry.values())
            kept = [*tensors_of(model), *(value for value in states if isinstance(value, torch.Tensor))]
            self._held = bytes_of(kept)
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if (profile := self.close()) is not None:
                self.peak_bytes = self._held + most_allocated(profile)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if gpu:
                self.peak_bytes = torch.cuda.max_memory_allocated()

        def close(self) -> Any:
            """Stops the profiler, also after a failed run: there can be one only; returns its profile, if any."""
            profile, self._profile = self._profile, None
            if profile is not None:
                profile.__exit__(None, None, None)
            return profile

    return Meter()


def tensors_of(model: Any) -> Iterator[Any]:
    """Parameters, buffers, and the scales that bitsandbytes stores beside its weights."""
    from torch import nn

    from ..nn.linear import QuantizedLinear
    from ..recipes.evaluate import scales_of

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear):
            yield from scales_of(module)


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of these tensors; a shared storage counts once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def most_allocated(profile: Any) -> int:
    """Peak bytes allocated on the CPU during a profile."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
