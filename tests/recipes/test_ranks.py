"""`torchrun -m llmtools quantize`: several processes (gloo), one output, and one line where a process ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmtools
from llmtools.cli.app import main
from llmtools.data.metrics import perplexity
from llmtools.nn.swap import quantized_linears
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tinystories: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model("llama").save_pretrained(folder / "model")
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    text = folder / "text.txt"
    text.write_text((tinystories / "train.txt").read_text()[:6000])
    flags = ["--model", str(folder / "model"), "--calibration", str(text), "--quantizer", "optq"]
    return [*flags, "--num_samples", "5", "--max_length", "24"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from llmtools.cli.app import main
from llmtools.model.quantize import _Quantization
store = _Quantization._store
def stored(self, unit):
    store(self, unit)
    if self.processes.rank == 1:
        kept = Path(sys.argv[sys.argv.index("--out") + 1] + ".quantizing", "model.layers.0.safetensors")
        while not kept.exists():  # which the other process writes
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SECONDS)
_Quantization._store = stored
sys.exit(main(sys.argv[1:]))
"""


def in_two(program: list[str], words: list[str], repository: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, *program, "quantize", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.parametrize("seconds", [0, 30], ids=["waiting", "computing"])
def test_processes_write_the_model_of_one_and_a_dead_one_ends_the_run_in_one_line(
    seconds: int, flags: list[str], tmp_path: Path, repository: Path
) -> None:
    """The other process hears of it by its connection, or by torchrun's SIGTERM while it computes."""
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(f"SECONDS = {seconds}\n{KILLED}")
    ended = in_two([str(script)], [*flags, "--out", str(out)], repository)
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("llmtools")]
    assert len(ours) == 1 and "another process of this run ended" in ours[0], ended.stderr
    assert {path.name for path in (tmp_path / "out.quantizing").glob("*.safetensors")} == {"model.layers.0.safetensors"}
    if seconds:
        return

    done = in_two(["-m", "llmtools"], [*flags, "--out", str(out), "--resume"], repository)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("modules at") == 1
    assert main(["quantize", *flags, "--out", str(tmp_path / "alone")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed.py", "out"]
    (two, _), (one, _) = (llmtools.load(folder) for folder in (str(out), str(tmp_path / "alone")))
    layers = quantized_linears(one)
    for path, layer in quantized_linears(two).items():
        torch.testing.assert_close(layer.dequantize(), layers.pop(path).dequantize(), rtol=1e-2, atol=1e-3)
    assert not layers
    ids = tiny_ids(1, 200)[0]
    found, expected = (perplexity(model, ids, context=64).value for model in (two, one))
    assert found == pytest.approx(expected, rel=1e-3)
