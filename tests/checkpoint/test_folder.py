"""Folders appear whole or not at all, come back bit for bit, and say what is wrong with them."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import llmtools
from llmtools import CheckpointError, InputError, files
from llmtools.checkpoint.folder import load_model, save
from llmtools.checkpoint.model_card import MARKER
from llmtools.files import writing
from llmtools.model.quantize import quantize
from llmtools.model.walk import run_network
from llmtools.nn.swap import quantized_linears
from tests.models import VOCABULARY, other_model, tiny_ids, tiny_model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model() -> Any:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    return model


def test_a_model_and_its_tokenizer_come_back(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = llmtools.save(model, tokenizer, tmp_path / "q")
    back, words = llmtools.load(folder)
    assert torch.equal(logits(back), logits(model)) and not back.training
    assert words("w7 w9").input_ids == [7, 9]
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_dense_model_comes_back_too(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("opt")
    back, _ = llmtools.load(llmtools.save(model, tokenizer, tmp_path / "dense"), dtype="auto")
    assert torch.equal(logits(back), logits(model)) and not quantized_linears(back)


def test_a_model_quantized_by_hand_is_described(tokenizer: Any, tmp_path: Path) -> None:
    """Layers that somebody put in place without `llmtools.quantize` are found when the model is saved."""
    from llmtools import QuantizedLinear, quantizer
    from llmtools.nn.swap import set_module

    model, path = tiny_model(), "model.layers.1.mlp.up_proj"
    set_module(model, path, QuantizedLinear.from_linear(model.get_submodule(path), quantizer("nf4")))
    back, _ = llmtools.load(llmtools.save(model, tokenizer, tmp_path / "q"))
    assert list(quantized_linears(back)) == [path] and torch.equal(logits(back), logits(model))


def test_the_note_says_how_the_model_came_to_be(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()
    report = llmtools.quantize(model, "rtn", bits=4, group_size=32)
    folder = llmtools.save(model, tokenizer, tmp_path / "q", report=report)
    note = json.loads((folder / "llmtools.json").read_text())
    assert note["versions"]["torch"] == torch.__version__
    assert note["quantizers"] == [llmtools.quantizer("rtn", bits=4, group_size=32).spec()]
    assert note["report"] == json.loads(json.dumps(report.to_json()))
    assert 4 < note["bits_per_weight"] < 6


def test_an_existing_folder_is_refused_and_kept(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious").write_text("here")
    with pytest.raises(InputError, match=r"q exists.*--overwrite"):
        llmtools.save(model, tokenizer, tmp_path / "q")
    assert (tmp_path / "q" / "precious").read_text() == "here"


def test_overwriting_replaces_the_folder_as_a_whole(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    llmtools.save(model, tokenizer, tmp_path / "q", max_shard_size="50KB")
    assert len(list((tmp_path / "q").glob("model-*-of-*.safetensors"))) > 1
    llmtools.save(model, tokenizer, tmp_path / "q", overwrite=True)
    assert [path.name for path in (tmp_path / "q").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(llmtools.load(tmp_path / "q")[0]), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


ENDS: dict[str, Callable[[], BaseException]] = {
    "ctrl-c": KeyboardInterrupt,
    "bug": lambda: RuntimeError("a bug"),
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "disk full, in safetensors": lambda: SafetensorError("I/O error: No space left on device (os error 28)"),
    "not allowed": lambda: PermissionError(errno.EACCES, "Permission denied"),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("before", [True, False], ids=["overwriting", "fresh"])
def test_whatever_ends_the_writing_leaves_nothing_behind(
    end: str, before: bool, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "er" / "q"
    if before:
        llmtools.save(model, tokenizer, folder)
    error = ENDS[end]()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    about_disk = "disk" in end or "allowed" in end
    with pytest.raises(InputError if about_disk else type(error), match="nothing was kept" if about_disk else None):
        llmtools.save(model, tokenizer, folder, overwrite=before)
    if before:
        assert [path.name for path in folder.parent.iterdir()] == ["q"]
        assert torch.equal(logits(llmtools.load(folder)[0]), logits(model))
    else:
        assert not any(tmp_path.iterdir())


def test_a_rename_that_fails_puts_the_former_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(tmp_path / "out") as partial:
        (partial / "old").touch()
    monkeypatch.setattr(files, "_swapped", lambda *_: False)  # a system that cannot exchange two names
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["llmtools.json", "old", "out"]


def test_folders_that_hold_more_than_a_result_are_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "work" / "here")
    for folder, complaint in [
        (tmp_path / "repository", "git repository"),
        (Path("."), "holds"),
        (tmp_path / "work", "holds"),
        (Path.home(), "holds"),
        (tmp_path / "file", "is a file"),
    ]:
        with pytest.raises(InputError, match=complaint), writing(folder, overwrite=True):
            raise AssertionError("must not begin")


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with writing(tmp_path / "ours") as partial:
        (partial / "file").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_same_model_is_the_same_bytes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The order of a file's metadata comes from a hash table with a seed of its own, in the safetensors library."""
    folders = [llmtools.save(model, tokenizer, tmp_path / f"q{number}") for number in range(5)]
    written = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"} for folder in folders
    ]
    assert all(each == written[0] for each in written)


def test_a_card_in_ones_own_words_outlives_the_folder(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    llmtools.save(model, tokenizer, tmp_path / "q")
    (tmp_path / "q" / "README.md").write_text("my own words")
    llmtools.save(model, tokenizer, tmp_path / "q", overwrite=True)
    assert (tmp_path / "q" / "README.md").read_text() == "my own words"
    (tmp_path / "q" / "README.md").write_text(f"{MARKER}\nold")
    llmtools.save(model, tokenizer, tmp_path / "q", overwrite=True)
    assert "old" not in (tmp_path / "q" / "README.md").read_text().splitlines()


def test_a_model_with_adapters_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match=r"carries adapters.*llmtools\.merge"):
        llmtools.save(adapted, tokenizer, tmp_path / "q")
    assert not any(tmp_path.iterdir())


def test_a_half_quantized_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmtools.quantize(model, "rtn", bits=4, group_size=32, on_step=stop)
    with pytest.raises(InputError, match="half quantized"):
        llmtools.save(model, tokenizer, tmp_path / "q")
    assert not any(tmp_path.iterdir())


def test_folders_that_are_no_checkpoint_are_told_apart(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        llmtools.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json .it is empty"):
        llmtools.load(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        llmtools.load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        llmtools.load(tmp_path / "empty" / "notes.txt")
    folder = llmtools.save(model, None, tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"no tokenizer.*tokenizer\.json"):
        llmtools.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"q: .*model\.safetensors"):
        llmtools.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        llmtools.load(folder)


def test_a_missing_dense_tensor_is_an_error_too(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = llmtools.save(model, tokenizer, tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight are missing"):
        llmtools.load(folder)


def test_a_missing_shard_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = llmtools.save(model, tokenizer, tmp_path / "q", max_shard_size="30KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        llmtools.load(folder)


def test_pickled_weights_are_not_read(tokenizer: Any, tmp_path: Path) -> None:
    folder = llmtools.save(tiny_model(), tokenizer, tmp_path / "dense")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="safetensors"):
        llmtools.load(folder)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "llava"])
@pytest.mark.parametrize("quantizer", [None, "rtn"])
def test_models_of_other_tasks_are_opened_as_what_they_are(kind: str, quantizer: str | None, tmp_path: Path) -> None:
    model = other_model(kind)
    if quantizer:
        quantize(model, quantizer, bits=4, group_size=16)
    with torch.no_grad():
        expected = run_network(model, tiny_ids()).logits
        again = load_model(save(model, None, tmp_path / "model"))
        assert type(again) is type(model)
        assert torch.equal(run_network(again, tiny_ids()).logits, expected)


def test_an_embedding_model_and_a_bare_decoder_with_a_tied_head_are_told_apart(tmp_path: Path) -> None:
    for tied, expected in ((False, "LlamaModel"), (True, "LlamaForCausalLM")):
        decoder = tiny_model("llama", tie_word_embeddings=tied).model
        decoder.save_pretrained(tmp_path / expected)
        assert type(load_model(tmp_path / expected)).__name__ == expected


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_a_head_of_its_own_under_a_tied_config_comes_back(name: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())
    quantize(model, name, [tiny_ids(2, 32)], bits=4, group_size=16, skip=())
    with torch.no_grad():
        expected = model(tiny_ids()).logits
        again = load_model(save(model, None, tmp_path / "model"))
        assert torch.equal(again(tiny_ids()).logits, expected)
        twice = load_model(save(again, None, tmp_path / "again"))
        assert torch.equal(twice(tiny_ids()).logits, expected)


def test_a_folder_that_still_says_tied_opens_with_its_quantized_head(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())
    quantize(model, "rtn", bits=4, group_size=16, skip=())
    folder = save(model, None, tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    assert told["tie_word_embeddings"] is False
    (folder / "config.json").write_text(json.dumps(told | {"tie_word_embeddings": True}))
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tiny_ids()).logits, model(tiny_ids()).logits)
