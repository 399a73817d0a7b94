"""PEFT's own tests of decoder models, on a quantized LLaMA and on the dense one of the same weights.

    python -m tests.interop.peft_suite [pytest's options, such as -k lora]

The tests come with the source distribution of the installed PEFT, which pip fetches; where it cannot be had, nothing is
run and that is said. Their list of models is replaced by a folder; nothing else is changed. What passes on the dense
model has to pass on the quantized one as well, or `OTHERWISE` says why it does not. What fails on both (mostly for want
of the hub) is counted. All of them take about twenty minutes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

MODEL = "tiny-decoder"
"""the name of the folder; where it says "llama" many of the tests are skipped, by a slip over another method"""
FILES = ("testing_common.py", "testing_utils.py", "test_decoder_models.py")

OTHERWISE = {
    r"\[.*GloraConfig": "PEFT takes plain nn.Linear for GLoRA, and no subclass",
    r"test_merge_layers": (
        "adapters are not merged into packed weights: PEFT's merge is refused, llmtools.merge gives the dense model"
    ),
}
"""test's name → why it does otherwise on quantized layers"""


def fetch(folder: Path) -> Path | None:
    """The source distribution of the installed PEFT; None where pip has no way to it."""
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", f"peft=={version('peft')}", *options], check=False)
    return next(folder.glob("peft-*.tar.gz"), None)


def unpack(archive: Path, package: Path) -> None:
    """Its decoder tests as a package, with our folder for their models."""
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "conftest.py").write_text("import llmtools\n", encoding="utf-8")
    with tarfile.open(archive) as members:
        for member in members:
            name = Path(member.name)
            if name.name in FILES and name.parent.name == "tests" and (stream := members.extractfile(member)):
                (package / name.name).write_bytes(stream.read())
    tests = package / "test_decoder_models.py"
    models = re.compile(r"^(PEFT_DECODER_MODELS_TO_TEST|SMALL_GRID_MODELS) = \[.*?^\]", re.DOTALL | re.MULTILINE)
    text, count = models.subn(rf'\1 = ["{MODEL}"]', tests.read_text(encoding="utf-8"))
    if count != 2:
        raise SystemExit("PEFT's decoder tests no longer have their two lists of models")
    tests.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("diffusers") is None:  # named by a helper for models of images
        (package.parent / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n", encoding="utf-8")


def write_models(dense: Path, quantized: Path) -> None:
    """The same weights twice."""
    import llmtools
    from tests.formats.writers import tiny_tokenizer
    from tests.models import tiny_model

    model = tiny_model(num_key_value_heads=4)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    llmtools.save(model, tiny_tokenizer(), quantized / MODEL)
    llmtools.save(llmtools.dequantize(model), tiny_tokenizer(), dense / MODEL)


def run(root: Path, where: Path, options: list[str]) -> dict[str, str]:
    """Test → "passed", "skipped" or "failed", of a run beside the folder of a model."""
    report = where / "report.xml"
    told = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore"]
    told += ["-c", os.devnull, f"--rootdir={root}", f"--junitxml={report}", *options, str(root / "peft_tests")]
    path = os.pathsep.join([str(root), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": path}
    with (where / "log").open("w", encoding="utf-8") as log:
        subprocess.run(told, cwd=where, env={**os.environ, **offline}, check=False, stdout=log, stderr=log)
    if not report.exists():
        raise SystemExit((where / "log").read_text(encoding="utf-8")[-3000:])
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[str(case.get("name"))] = outcome
    return outcomes


def compare(dense: dict[str, str], quantized: dict[str, str]) -> int:
    """Prints what differs, with its reason; returns how much of it has none."""
    lost = sorted(name for name, outcome in dense.items() if outcome == "passed" and quantized.get(name) != "passed")
    unexplained = [name for name in lost if not any(re.search(pattern, name) for pattern in OTHERWISE)]
    counts = {kind: sum(each == kind for each in dense.values()) for kind in ("passed", "skipped", "failed")}
    print(f"dense: {counts}; of those passed, {counts['passed'] - len(lost)} pass on quantized layers")
    for pattern, reason in OTHERWISE.items():
        print(f"  {sum(bool(re.search(pattern, name)) for name in lost):4} {pattern}: {reason}")
    for name in unexplained:
        print(f"  LOST {name}")
    return len(unexplained)


def main(options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        dense, quantized, archives = (root / name for name in ("dense", "quantized", "archives"))
        for folder in (dense, quantized, archives):
            folder.mkdir()
        archive = fetch(archives)
        if archive is None:
            print("PEFT's tests were not run: pip could not fetch its source distribution")
            return 0
        unpack(archive, root / "peft_tests")
        write_models(dense, quantized)
        return min(compare(run(root, dense, options), run(root, quantized, options)), 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
