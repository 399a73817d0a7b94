"""Recover a quantized model: train its floating tensors on the original's distributions, write a new checkpoint."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.options import ModelOptions
from ..errors import InputError
from ..model.options import RECOVERY, Recovery
from ..signals import Stopped, interruptible

LONGEST = 512
"""Tokens in a sequence to recover on: the logits of a sequence are in memory three times."""


@dataclass(frozen=True)
class Recover(ModelOptions):
    """Train the scales, zero points, sign vectors and norms of a quantized model on the original's distributions."""

    model: str
    """Folder or hub name of the quantized model, of llmtools, GPTQ, AWQ, compressed-tensors, HQQ or bitsandbytes, or a
    GGUF file."""
    calibration: str
    """Text to train on: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub."""
    out: str
    """Folder to write the recovered model to, in the format of the quantized one; of a GGUF file also a file, whose
    name ends in .gguf."""
    original: str | None = None
    """Folder or hub name of the model that was quantized; by default the one that the checkpoint names."""
    num_samples: int = 128
    """Number of sequences."""
    max_length: int = LONGEST
    """Length of a sequence in tokens."""
    seed: int = 0
    """Seed of the choice of sequences and of their order."""
    recover: Recovery = RECOVERY
    """Options of the training; --recover.steps 200."""
    adapter_rank: int = 0
    """Rank of LoRA adapters to train afterwards, on the same distributions; they are written to the folder's adapter,
    and are what finetune --lora.init error begins with; 0: none."""
    resume: bool = False
    """Whether to go on from the last saved state of a run that was stopped."""
    overwrite: bool = False
    """Permission to replace the output folder."""


@dataclass(frozen=True)
class RecoverResult:
    """The new checkpoint, and what recovery changed."""

    out: str
    """Folder of the checkpoint."""
    kl_before: float
    """KL divergence of the original from the model on held-out sequences before, in nats per token."""
    kl: float
    """The same after."""
    kl_adapter: float | None
    """The same with the adapter; None without one."""
    steps: int
    """Number of training steps of the floating values."""
    trained: int
    """Number of trained values."""
    format: str
    """Format of the checkpoint: llmtools, or the third-party format that the quantized model has."""
    seconds: float
    """Duration in seconds."""

    def __str__(self) -> str:
        adapter = "" if self.kl_adapter is None else f", with the adapter {self.kl_adapter:.4f}"
        return (
            f"{self.out} ({self.format}): KL divergence from the original {self.kl_before:.4f} → {self.kl:.4f} nats "
            f"per token on held-out text, after {self.steps} steps on {self.trained} values{adapter}, in "
            f"{self.seconds:.1f} s"
        )


def recover(recipe: Recover) -> RecoverResult:
    """Recovers the model and writes the checkpoint."""
    from ..files import claim

    if not recipe.recover.steps:
        raise InputError("recover.steps=0; give a number of training steps")
    if recipe.adapter_rank < 0:
        raise InputError(f"adapter_rank={recipe.adapter_rank}; at least 0 is expected")
    reads = [recipe.model, recipe.original, recipe.calibration]
    if _is_file(recipe):
        _check_file(recipe, reads)
        with interruptible():
            return _recover(recipe)
    with claim(recipe.out, overwrite=recipe.overwrite, reads=reads):
        return _recover(recipe)


def _is_file(recipe: Recover) -> bool:
    return recipe.out.endswith(".gguf")


def _check_file(recipe: Recover, reads: list[str | None]) -> None:
    """Raises InputError where no GGUF file may be written as `out`."""
    from ..files import check_no_input
    from ..formats.gguf_adapter import check_file_free

    check_no_input(Path(recipe.out).expanduser(), reads)
    check_file_free(recipe.out, overwrite=recipe.overwrite)
    if not recipe.model.endswith(".gguf"):
        raise InputError(f"{recipe.out}: {recipe.model} is no GGUF file; choose a folder, without .gguf")
    if recipe.adapter_rank:
        raise InputError(
            f"{recipe.out}: a GGUF file holds no adapter; choose a folder for --adapter_rank, without .gguf"
        )


def _recover(recipe: Recover) -> RecoverResult:
    from ..checkpoint.loading import check_model, import_plugins, quiet_libraries
    from ..data.calibration import HUB
    from ..data.text_io import existing_file
    from ..files import METADATA, json_or_empty

    began = time.monotonic()
    check_model(recipe.model)
    import_plugins(recipe.plugin)
    if recipe.calibration not in HUB:
        existing_file(recipe.calibration)
    original = recipe.original or json_or_empty(Path(recipe.model).expanduser() / METADATA).get("base_model")
    if not isinstance(original, str):
        raise InputError(f"{recipe.model} does not name the model that it was quantized from; pass --original NAME")
    check_model(original)
    quiet_libraries()
    with _work_folder(recipe, original) as work:
        return _recovered(recipe, original, work, began)


def _recovered(recipe: Recover, original: str, work: Path, began: float) -> RecoverResult:
    from ..checkpoint.folder import LORA_INIT, load_lora_init
    from ..checkpoint.loading import open_model
    from ..checkpoint.run_info import record
    from ..data.calibration import calibration
    from ..formats.rewriting import rewriter as rewriter_of
    from ..formats.rewriting import rewriter_if_any
    from ..model.recover import check_recoverable
    from ..nn.swap import quantized_linears

    model, _ = open_model(recipe.model, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify)
    check_recoverable(model)  # before the long work; then one model at a time is in memory
    rewriter = (rewriter_of if _is_file(recipe) else rewriter_if_any)(recipe.model, model)
    del model
    teacher, tokenizer = open_model(original, trust_remote_code=recipe.trust_remote_code)
    if quantized_linears(teacher):
        raise InputError(f"{original} is quantized, too; pass the original model, --original NAME")
    text = calibration(
        recipe.calibration, tokenizer, samples=recipe.num_samples, tokens=recipe.max_length, seed=recipe.seed
    )
    targets = distributions(teacher, text, recipe.recover, work / "targets")
    del teacher
    model, tokenizer = open_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    found = train(model, text, targets, recipe.recover, recipe.seed, work / "state.safetensors")
    recovery, adapters = found._asdict(), None
    if recipe.adapter_rank:
        initial = load_lora_init(recipe.model) if (Path(recipe.model).expanduser() / LORA_INIT).exists() else {}
        adapters = train_adapter(
            model,
            text,
            targets,
            recipe.recover,
            recipe.adapter_rank,
            initial,
            recipe.seed,
            work / "adapter.safetensors",
        )
        recovery["with_adapter"] = adapters.after
    model.config.name_or_path = original  # type: ignore[union-attr]
    run = record("recover", recipe, recovery=recovery)
    _write(recipe, rewriter, model, tokenizer, run, adapters.adapters if adapters else {})
    return RecoverResult(
        recipe.out,
        found.before,
        found.after,
        adapters.after if adapters else None,
        found.steps,
        found.trained,
        format="llmtools" if rewriter is None else rewriter.format,
        seconds=time.monotonic() - began,
    )


def _write(
    recipe: Recover,
    rewriter: Any,
    model: Any,
    tokenizer: Any,
    run: dict[str, Any],
    adapters: dict[str, Any],
) -> None:
    from ..checkpoint.folder import ADAPTER, write, write_adapter, write_again
    from ..checkpoint.model_card import write_card
    from ..files import METADATA, json_or_empty, writing
    from ..formats.gguf_adapter import write_file
    from ..formats.rewriting import GGUFRewriter

    out = Path(recipe.out).expanduser()
    if _is_file(recipe):
        assert isinstance(rewriter, GGUFRewriter)
        write_file(out, partial(rewriter.write_file, model), recipe.overwrite)
        return
    report = json_or_empty(Path(recipe.model).expanduser() / METADATA).get("report")
    with writing(out, overwrite=recipe.overwrite) as folder:
        if adapters:
            write_adapter(model, adapters, folder / ADAPTER, base=_base(out, rewriter))
        if rewriter is not None:  # lists the files so far
            write_again(rewriter, model, folder, run=run, lora_init=adapters)
        else:
            write(model, tokenizer, folder, report=report, run=run, lora_init=adapters)
        write_card(folder, name=out.resolve().name, former=out)


def _base(out: Path, rewriter: Any) -> str:
    """The name by which the adapter's configuration knows the model in the folder `out`: its full path."""
    from ..formats.rewriting import GGUFRewriter

    return str(out.resolve() / (rewriter.file.path.name if isinstance(rewriter, GGUFRewriter) else ""))


@contextmanager
def _work_folder(recipe: Recover, original: str) -> Iterator[Path]:
    """OUT.recovering, with the targets and the training state; kept where the run is stopped, removed otherwise.

    Raises InputError for one that is left of another run, and where there is nothing to resume.
    """
    from ..checkpoint.inputs import content_of_model
    from ..checkpoint.work_folder import begun
    from ..content import content
    from ..data.calibration import HUB

    unbound = ("model", "original", "calibration", "out", "resume", "overwrite", "verify")
    settings = {
        "options": {key: value for key, value in asdict(recipe).items() if key not in unbound},
        "model": content_of_model(recipe.model) or recipe.model,
        "original": content_of_model(original) or original,
        "text": recipe.calibration if recipe.calibration in HUB else content(recipe.calibration),
    }
    work = begun(Path(recipe.out), "recovering", settings, resume=recipe.resume, overwrite=recipe.overwrite)
    try:
        yield work
    except KeyboardInterrupt as error:
        raise Stopped(
            "stopped; --resume continues from the last evaluation", getattr(error, "exit_code", 130)
        ) from error
    except InputError:
        if not recipe.resume:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


class Recovered(NamedTuple):
    """What recovery after quantizing found."""

    report: dict[str, Any]
    """`RecoveryReport` as JSON; ``with_adapter`` is the divergence with the adapters, if there are any."""
    adapters: dict[str, Any]
    """Module → trained LoRA matrices; {} without."""


@contextmanager
def recovering(
    model: Any, text: Sequence[Any], options: Recovery, seed: int, adapter_rank: int = 0, storage: Any = None
) -> Iterator[Callable[[Mapping[str, Any]], Recovered | None]]:
    """Keeps the distributions of a `model` that is about to be quantized; yields what recovers it afterwards.

    text: token ids [b, t] each. The function that it yields takes the LoRA matrices that adapters of that rank begin
    with; with 0 steps it does nothing and returns None. storage: the `Streamed` storage of a model that is not in
    memory; the distributions are in its folder then, for a run that continues.
    """
    if not options.steps:
        yield lambda initial: None
        return
    sequences = [piece for ids in text for row in ids.split(1) for piece in row.split(LONGEST, dim=1)]
    kept = (
        tempfile.TemporaryDirectory(prefix="llmtools-") if storage is None else nullcontext(storage.folder / "targets")
    )
    with kept as folder:
        with nullcontext() if storage is None else storage.whole():
            targets = distributions(model, sequences, options, Path(folder))

        def recovered(initial: Mapping[str, Any]) -> Recovered:
            report = train(model, sequences, targets, options, seed)._asdict()
            if not adapter_rank:
                return Recovered(report, {})
            found = train_adapter(model, sequences, targets, options, adapter_rank, initial, seed)
            return Recovered({**report, "with_adapter": found.after}, found.adapters)

        yield recovered


def distributions(model: Any, sequences: Sequence[Any], options: Recovery, folder: Path) -> Any:
    """`model.recover.Targets` of the original model, with a progress bar."""
    from ..model.recover import Targets
    from ..progress import progress

    with progress("original model", unit="sequences") as step:
        return Targets.of(model, sequences, folder, options.top_k, on_step=step)


def train(
    model: Any, sequences: Sequence[Any], targets: Any, options: Recovery, seed: int, state: Path | None = None
) -> Any:
    """`model.recover.recover` with a progress bar."""
    from ..model.recover import recover as recover_model
    from ..progress import progress

    with progress("recover", unit="steps") as step:
        return recover_model(model, sequences, targets, options, state=state, seed=seed, on_step=step)


def train_adapter(
    model: Any,
    sequences: Sequence[Any],
    targets: Any,
    options: Recovery,
    rank: int,
    initial: Mapping[str, Any],
    seed: int,
    state: Path | None = None,
) -> Any:
    """`model.recover.train_adapters` with a progress bar."""
    from ..model.recover import train_adapters
    from ..progress import progress

    with progress("adapter", unit="steps") as step:
        return train_adapters(
            model, sequences, targets, options, rank, initial=initial, state=state, seed=seed, on_step=step
        )
