"""Every causal family of transformers, tiny and without a download: what of it is quantized, and whether it is right.

    python -m benchmarks.families                    # all that have no row yet, then docs/results/families.md
    python -m benchmarks.families llama gemma3_text  # these anew

For each model type with a causal language model a tiny model is made (`tiny.py`), and in a process of its own, with a
time limit, taken through the steps of `STEPS`. A row is one JSON line in benchmarks/results/families.jsonl; what is
there for the same versions is not measured again without ``--fresh``.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import VOCABULARY, tiny_model

RESULTS = Path(__file__).resolve().parent / "results" / "families.jsonl"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "families.md"

STEPS = {
    "inputs": "what each linear is given in the walk is, to the bit, what it is given in the model's own forward",
    "rtn": "after `rtn`, logits are those of the model with the decoded weights",
    "optq": "after `optq`, logits are those of the model with the decoded weights",
    "reload": "saved and opened again, the `optq` model gives the same logits, to the bit",
    "greedy": "and the same greedy tokens",
    "lora": "LoRA on all linears changes nothing while it is zero, and three steps have finite losses and gradients",
    "merge": "the merged model gives the logits of base and adapter",
}
OK, NONE = "ok", "-"
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all without one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one a family")
    parser.add_argument("--page", type=Path, default=PAGE, help="the table")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a family")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a row")
    given = parser.parse_args(argv)
    rows = read(given.results)
    names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    wanted = given.families or [
        name for name in names if given.fresh or rows.get(name, {}).get("versions") != versions()
    ]
    for name in wanted:
        row = in_a_process(name, given.seconds)
        rows[name] = row
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:28} {one_line(row)}", flush=True)
    compact(given.results, [rows[name] for name in names if name in rows])
    if set(names) <= rows.keys():
        given.page.write_text(page([rows[name] for name in names]), encoding="utf-8")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# One family


def measure(name: str, make: Callable[[str], Any] = tiny_model) -> Row:
    """The row of a family: its class, the share of its weights that is quantized, and what became of each step."""
    import llmtools as lt
    from llmtools.checkpoint.folder import load_model

    began = time.monotonic()
    row: Row = {"family": name, "class": None, "share": None, "steps": {}, "versions": versions()}
    steps = row["steps"]

    def step(what: str, do: Callable[[], Any], dense: Callable[[], Any] | None = None) -> Any:
        """What `do` returns, True for nothing; None where it raised. dense: the same of the model as it was."""
        try:
            result = do()
        except Exception as error:
            steps[what] = error_line(error) + (" (the dense model fails, too)" if dense and fails(dense) else "")
            return None
        steps[what] = NONE if result is NONE else OK
        return True if result is None else result

    try:
        model = make(name)
        row["class"] = type(model).__name__
        before = logits(model)
    except Exception as error:
        return row | {"not_built": error_line(error), "seconds": time.monotonic() - began}
    if not bool(torch.isfinite(before).all()):
        return row | {"not_built": "the tiny model's own logits are not finite", "seconds": time.monotonic() - began}
    options: dict[str, Any] = {"bits": 4, "group_size": 16}
    step("inputs", lambda: compare_inputs(model))
    rtn, optq = copy.deepcopy(model), copy.deepcopy(model)
    report = step("rtn", lambda: lt.quantize(rtn, "rtn", **options))
    if report is not None:
        row["share"] = share(model, report)
        step("rtn", lambda: compare_decoded(model, rtn))
    if step("optq", lambda: lt.quantize(optq, "optq", batches(), **options)) is None:
        return row | {"seconds": time.monotonic() - began}
    step("optq", lambda: compare_decoded(model, optq))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        again = step(
            "reload",
            lambda: reloaded(optq, folder, lt.save, load_model),
            lambda: reloaded(model, folder.with_name("dense"), lt.save, load_model),
        )
    if again is not None:
        step("greedy", lambda: compare_greedy(optq, again), lambda: compare_greedy(model, model))
        adapted = step("lora", lambda: trained(again, model), lambda: trained(copy.deepcopy(model), model))
        if adapted is not None:
            step("merge", lambda: compare_merged(adapted))
    return row | {"seconds": time.monotonic() - began}


def batches() -> list[Tensor]:
    """Calibration of unequal sizes: token ids [batch, t]."""
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, shape, generator=drawn) for shape in ((2, 16), (1, 24), (1, 24), (3, 16))]


def logits(model: Any) -> Tensor:
    """On two sequences, [2, 16, vocabulary] float32."""
    from llmtools.model.walk import run_network

    with torch.no_grad():
        torch.manual_seed(0)
        return run_network(model, batches()[0]).logits.float()  # type: ignore[no-any-return]


def compare_inputs(model: Any) -> None:
    """Raises unless the walk shows each linear what the network gives it."""
    from llmtools.model.walk import run_network, walk

    walked: dict[int, list[Tensor]] = {}

    def visit(block: Any, calls: Any) -> None:
        for _ in range(2):  # the second time as the first
            walked.update(given_to_linears(block.module, calls.run))

    with torch.no_grad():
        whole = given_to_linears(model, lambda: [run_network(model, batch) for batch in batches()])
        walk(model, batches(), visit)
    paths = {id(module): path for path, module in model.named_modules()}
    for key, seen in walked.items():
        if len(seen) != len(whole[key]) or not all(map(torch.equal, seen, whole[key])):
            raise AssertionError(f"{paths[key]} is given something else in the walk")


def given_to_linears(module: nn.Module, run: Callable[[], Any]) -> dict[int, list[Tensor]]:
    seen: dict[int, list[Tensor]] = {}

    def note(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(id(linear), []).append((args[0] if args else kwargs["input"]).detach().clone())

    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    hooks = [each.register_forward_pre_hook(note, with_kwargs=True) for each in linears]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def compare_decoded(model: Any, quantized: Any) -> None:
    """Raises unless the quantized model computes what the original does with the decoded weights in it."""
    from llmtools.nn.experts import unfused_within
    from llmtools.nn.swap import quantized_linears

    dense = copy.deepcopy(model)
    with torch.no_grad(), unfused_within(dense):
        for path, layer in quantized_linears(quantized).items():
            dense.get_submodule(path).weight.copy_(layer.dequantize(dtype=torch.float32))
    close(logits(quantized), logits(dense), "logits")


def close(one: Tensor, other: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raises unless two tensors are equal but for rounding, measured by the larger one's root mean square."""
    size = float(other.double().square().mean().sqrt()) + 1e-12
    difference = float((one.double() - other.double()).square().mean().sqrt()) / size
    if not difference <= tolerance:
        raise AssertionError(f"{what} differ by {difference:.2g} of their size")


def reloaded(model: Any, folder: Path, save: Any, load: Any) -> Any:
    before = logits(model)
    save(model, None, folder)
    again = load(folder)
    after = logits(again)
    if not torch.equal(before, after):
        raise AssertionError(f"logits differ by {float((after - before).abs().max()):.2g} after reloading")
    return again


def compare_greedy(model: Any, again: Any) -> Any:
    if not model.can_generate():
        return NONE
    ids = batches()[1][:, :8]
    texts = [
        each.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        for each in (model, again)
    ]
    if not torch.equal(*texts):
        raise AssertionError("greedy tokens differ after reloading")
    return None


def linears_with_gradients(model: Any) -> set[str]:
    """Paths of the linears that are called and that the loss depends on; an expert without tokens, or a pooler, or a
    linear whose weight alone is read, is none."""
    linears = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    called: set[str] = set()
    hooks = [each.register_forward_hook(lambda *_, path=path: called.add(path)) for path, each in linears.items()]
    for each in linears.values():
        each.weight.requires_grad_(True)
    loss_of(model.train()).backward()
    model.eval()
    found = {path for path, each in linears.items() if each.weight.grad is not None}
    for each in linears.values():
        each.weight.grad = None
    for hook in hooks:
        hook.remove()
    return found & called


def loss_of(model: Any) -> Tensor:
    ids = batches()[0]
    predicted = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten())


def trained(model: Any, dense: Any) -> Any:
    """The model with adapters on all linears that were trained for three steps. Raises where something is amiss.

    dense: the model as it was, which says where gradients are to be expected.
    """
    import peft

    import llmtools as lt
    from llmtools.nn.adapters import not_adaptable

    useful = linears_with_gradients(dense)
    before = logits(model)
    lt.prepare_for_training(model, gradient_checkpointing=False)
    others = not_adaptable(model) or None
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of names that it looked for in vain
        adapted = peft.get_peft_model(model, config).eval()
    close(logits(adapted), before, "logits with zero adapters", 1e-6)
    adapted.train()
    mine = {path: each for path, each in adapted.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(mine.values(), lr=1e-2)
    for _ in range(3):
        loss = loss_of(adapted)
        if not bool(torch.isfinite(loss)):
            raise AssertionError(f"loss {float(loss)}")
        optimizer.zero_grad()
        loss.backward()
        for path, each in mine.items():
            linear = path.removeprefix("base_model.model.").partition(".lora_")[0]
            if each.grad is None and linear in useful:
                raise AssertionError(f"{path} has no gradient")
            if each.grad is not None and not bool(torch.isfinite(each.grad).all()):
                raise AssertionError(f"{path}: gradient not finite")
        optimizer.step()
    return adapted.eval()


def compare_merged(adapted: Any) -> None:
    import llmtools as lt

    before = logits(adapted)
    close(logits(lt.merge(adapted)), before, "logits of the merged model")


def share(model: Any, report: Any) -> float:
    """Quantized weights among all matrices outside embeddings and head."""
    head = model.get_output_embeddings()
    total = sum(
        each.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for each in module.parameters(recurse=False)
        if each.dim() >= 2
    )
    return report.weights / max(1, total)  # type: ignore[no-any-return]


def fails(do: Callable[[], Any]) -> bool:
    try:
        do()
    except Exception:
        return True
    return False


def error_line(error: BaseException) -> str:
    """An error in one line, with the place where it was raised if it is not ours."""
    from llmtools.errors import InputError

    text = re.sub(re.escape(tempfile.gettempdir()) + r"/\S*?(?=[:\s]|$)", "the folder", str(error))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if isinstance(error, InputError | AssertionError) and first:
        return first[:240]
    frames = traceback.extract_tb(error.__traceback__)
    place = next(
        (f" ({Path(f.filename).name}:{f.lineno})" for f in reversed(frames) if "/torch/" not in f.filename), ""
    )
    return f"{type(error).__name__}: {first[:180]}{place}"


# ---------------------------------------------------------------------------------------------------------------------
# Processes, rows


def versions() -> dict[str, str]:
    import llmtools

    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"llmtools": llmtools.__version__, "python": platform.python_version(), **packages}


def in_a_process(name: str, seconds: int) -> Row:
    """The row of a family, measured in a child of this process, which has the libraries loaded."""
    import peft  # noqa: F401 (loaded once, for all children)
    import transformers

    import llmtools.checkpoint.folder  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, there))
    began = time.monotonic()
    child.start()
    there.close()
    row: Row = {"family": name, "class": None, "share": None, "steps": {}, "versions": versions()}
    try:
        row = here.recv() if here.poll(seconds) else row | {"not_built": f"not done in {seconds} seconds"}
    except EOFError:
        child.join()
        row["not_built"] = f"the process ended with {child.exitcode}"
    finally:
        if child.is_alive() and child.pid:
            child.join(5)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
        child.join()
    return row | {"seconds": round(row.get("seconds", time.monotonic() - began), 1)}


def _child(name: str, pipe: Any) -> None:
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pipe.send(measure(name))


def read(results: Path) -> dict[str, Row]:
    """Family → its last row."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {row["family"]: row for row in map(json.loads, lines)}


def compact(results: Path, rows: list[Row]) -> None:
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def is_clean(row: Row) -> bool:
    """Whether all steps went well."""
    return (
        "not_built" not in row
        and set(row["steps"]) == set(STEPS)
        and all(v in (OK, NONE) for v in row["steps"].values())
    )


def reason(row: Row) -> str:
    if "not_built" in row:
        return f"no tiny model: {row['not_built']}"
    return next((f"{what}: {row['steps'][what]}" for what in STEPS if row["steps"].get(what, OK) not in (OK, NONE)), "")


def one_line(row: Row) -> str:
    marks = "".join(
        {OK: "+", NONE: "-"}.get(row["steps"].get(what, "?"), "x" if what in row["steps"] else ".") for what in STEPS
    )
    part = "   ?" if row["share"] is None else f"{100 * row['share']:3.0f}%"
    return f"{marks} {part} {row['seconds']:5.1f} s  {reason(row)}"


def page(rows: list[Row]) -> str:
    """The table of docs/results/families.md."""
    clean = [row for row in rows if is_clean(row)]
    used = sorted({" · ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows})
    lines = [
        "# Causal families of transformers",
        "",
        f"Written by `python -m benchmarks.families` from benchmarks/results/families.jsonl ({'; '.join(used)}).",
        f"Of {len(rows)} model types {len(clean)} pass every step; "
        f"{sum('not_built' in row for row in rows)} could not be built here. Models are tiny, with random weights.",
        "",
        *(f"* **{what}** — {meaning}." for what, meaning in STEPS.items()),
        "",
        "*share* is that of the quantized weights among all matrices outside embeddings and head. What is no "
        "`nn.Linear` (convolutions, routers, experts outside transformers' interface) or belongs to another modality "
        "stays as it is.",
        "",
        f"| model type | class | share | {' | '.join(STEPS)} | why not |",
        f"|---|---|---|{'---|' * len(STEPS)}---|",
    ]
    for row in rows:
        part = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
        marks = [
            {OK: "✓", NONE: "–"}.get(row["steps"].get(what, ""), "✗" if what in row["steps"] else "") for what in STEPS
        ]
        why = reason(row).replace("|", "\\|")
        lines.append(f"| {row['family']} | {row['class'] or ''} | {part} | {' | '.join(marks)} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
