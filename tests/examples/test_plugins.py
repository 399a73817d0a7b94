"""A quantizer and a format from outside the package, as real installed distributions, used by their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WHOLE_JOB = """
import json, sys
from llmtools.recipes.evaluate import Evaluate, evaluate
from llmtools.recipes.finetune import Finetune, finetune
from llmtools.recipes.quantize import Quantize, quantize

dense, text = sys.argv[1:]
quantize(Quantize(model=dense, quantizer="uniform", options={"levels": 31}, out="packed"))
steps = {"max_steps": 3, "max_length": 64, "per_device_train_batch_size": 2}
finetune(Finetune(model="packed", data=text, out="adapter", training=steps))
models = [(dense, None), ("packed", None), ("packed", "adapter")]
made = [Evaluate(model=model, adapter=adapter, data=text, max_length=256) for model, adapter in models]
print(json.dumps([evaluate(recipe).value for recipe in made]))
"""


@pytest.fixture(scope="module")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distributions in it, as pip lays them out."""
    target = tmp_path_factory.mktemp("site")
    sources = []
    for example in ("llmtools-uniform", "llmtools-toy8"):  # built elsewhere: building litters
        source = tmp_path_factory.mktemp("source")
        sources.append(source)
        for file in (repository / "examples" / example).iterdir():
            if file.is_file():
                (source / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def python(folder: Path, *args: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder`, with the distributions in `path`."""
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_it_keeps_the_laws_under_its_name(installed: Path, tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "llmtools", "check", "uniform", path=installed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_keeps_the_laws_as_a_class_that_is_not_installed(repository: Path, tmp_path: Path) -> None:
    source = repository / "examples" / "llmtools-uniform"
    done = python(tmp_path, "-m", "llmtools", "check", "llmtools_uniform:Uniform", "--options.levels", 7, path=source)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quantize_save_load_finetune(installed: Path, tmp_path: Path, stories: Path, tinystories: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text((tinystories / "held_out.txt").read_text()[:8000])
    done = python(tmp_path, "-c", WHOLE_JOB, stories, text, path=installed)
    assert done.returncode == 0, done.stderr
    dense, packed, finetuned = json.loads(done.stdout.splitlines()[-1])
    assert abs(packed / dense - 1) < 0.05
    assert finetuned != packed
    assert finetuned < 2 * packed
    spec = {"name": "uniform", "levels": 31}
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quantizers"] == [spec]

    without = python(tmp_path, "-m", "llmtools", "generate", "--model", "packed", "--prompt", "Once")
    assert without.returncode == 2
    assert "'uniform'" in without.stderr


FORMAT = """
import sys, torch
import llmtools
from llmtools.formats import formats, laws
from llmtools.formats.writing import export

assert laws.check(formats.known("toy8")) == 1
model, tokenizer = llmtools.load(sys.argv[1])
llmtools.quantize(model, "rtn", bits=8, group_size=-1, symmetric=True)
ids = torch.arange(1, 30).reshape(1, -1)
with torch.no_grad():
    logits = model(ids).logits
export(model, tokenizer, "toy", "toy8")
again, _ = llmtools.load("toy")
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits)
"""


def test_a_format_writes_and_reads_whole_models(installed: Path, tmp_path: Path, stories: Path) -> None:
    done = python(tmp_path, "-c", FORMAT, stories, path=installed)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "toy" / "config.json").read_text())["quantization_config"] == {"quant_method": "toy8"}
    listed = python(
        tmp_path, "-m", "llmtools", "export", "--format", "toy9", "--model", "toy", "--out", "x", path=installed
    )
    assert listed.returncode == 2
    assert "toy8" in listed.stderr
    without = python(tmp_path, "-m", "llmtools", "generate", "--model", "toy", "--prompt", "Once")
    assert without.returncode == 2
    assert "toy8" in without.stderr
