"""Training on the known tasks: what is learned, what is padding, what is left out; the baselines of bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from llmtools.errors import InputError
from llmtools.recipes.evaluate import Evaluate, evaluate
from llmtools.recipes.finetune import Finetune, Lora, finetune

ASSETS = Path(__file__).parent.parent / "assets"
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


def recipe(model: Path, out: Path, task: str = "samsum", **changes: Any) -> Finetune:
    if task == "samsum":
        changes.setdefault("options", {"source_tokens": 90, "max_new_tokens": 45})
    changes.setdefault("training", TRAINING)
    return Finetune(model=str(model), data=str(ASSETS / task), out=str(out), task=task, lora=Lora(r=2), **changes)


def test_the_answer_and_the_end_are_learned_and_nothing_else(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over whole batches: prompt and padding are masked, the separator stands whole before what is learned."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    seen: list[Any] = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, **kw: seen.extend(self.get_train_dataloader()))
    finetune(recipe(stories, tmp_path / "a"))
    tokenizer = AutoTokenizer.from_pretrained(stories)
    answers = {row["summary"] for row in json.loads((ASSETS / "samsum" / "train.json").read_text())}
    told = []
    for batch in seen:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            learned = labels != -100
            assert (labels[learned] == ids[learned]).all()
            assert not learned[mask == 0].any()
            text = tokenizer.decode(ids[learned])
            assert text.endswith(tokenizer.eos_token)
            told.append(text.removesuffix(tokenizer.eos_token).strip())
            first = int(learned.nonzero()[0])
            assert tokenizer.decode(ids[:first]).endswith("\n ### Output:")
            assert first <= 91  # source_tokens and the start token
    assert sorted(told) == sorted(answers)  # every answer, and every one whole
    assert any((batch["attention_mask"] == 0).any() for batch in seen)


def test_a_record_s_own_text_and_messages_are_not_what_is_learned(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rows of tatsu-lab/alpaca, which have a "text" beside instruction and output."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    answers = ["An apple.", "A pear.", "A plum and " * 200]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"instruction": "Name a fruit.", "input": "", "output": answer} for answer in answers]
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps([{**row, "text": f"Below is {row}", "messages": messages} for row in rows]))
    seen: list[Any] = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, **kw: seen.extend(self.get_train_dataloader()))
    made = Finetune(
        model=str(stories),
        data=str(data),
        out=str(tmp_path / "a"),
        task="alpaca",
        lora=Lora(r=2),
        training={**TRAINING, "max_length": 300},
    )
    assert finetune(made).left_out == 1
    tokenizer = AutoTokenizer.from_pretrained(stories)
    (batch,) = seen
    told = {tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert told == {answer + tokenizer.eos_token for answer in answers[:2]}
    assert json.loads((tmp_path / "a" / "llmtools.json").read_text())["prompt_format"]["record_format"] == "prompt"


def test_the_task_s_lengths_are_the_length_of_an_example(
    stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = finetune(recipe(stories, tmp_path / "a", options={"source_tokens": 90, "max_new_tokens": 20}))
    run = json.loads((tmp_path / "a" / "llmtools.json").read_text())
    assert run["training"]["max_length"] == 112
    assert result.left_out == 0  # a longer answer takes its room from the chat
    assert run["prompt_format"]["template"]["prompt"] == "### Summarize this: {dialogue}\n ### Output:"


def test_a_task_that_only_evaluates_cannot_be_trained_on(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        finetune(recipe(stories, tmp_path / "a", task="bbh"))
    with pytest.raises(InputError, match="'data' is given twice: as --data"):
        finetune(recipe(stories, tmp_path / "a", options={"data": "x"}))
    with pytest.raises(InputError, match="did you mean 'source_tokens'"):
        finetune(recipe(stories, tmp_path / "a", options={"source_token": 3}))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_baselines_of_bitsandbytes_train_and_are_judged(kind: str, stories: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("rouge_score")
    result = finetune(recipe(stories, tmp_path / "a", load=kind))
    assert result.steps == 2
    assert result.train_loss is not None
    judged = evaluate(
        Evaluate(
            adapter=str(tmp_path / "a"),
            task="samsum",
            data=str(ASSETS / "samsum"),
            options={"source_tokens": 90, "max_new_tokens": 4},
        )
    )
    low, high = {"nf4": (4, 5), "int8": (8, 9)}[kind]  # as the adapter was trained
    assert low < judged.bits_per_weight < high


def test_what_cannot_be_loaded_is_said(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nf4 or int8 is expected"):
        finetune(recipe(stories, tmp_path / "a", load="nf5"))
    monkeypatch.setattr("llmtools.checkpoint.loading.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'llmtools\[bitsandbytes\]'"):
        finetune(recipe(stories, tmp_path / "a", load="nf4"))
    assert not (tmp_path / "a.training").exists()


def test_a_result_is_readable_and_whole(stories: Path) -> None:
    judged = evaluate(
        Evaluate(
            model=str(stories),
            task="bbh",
            data=str(ASSETS / "bbh"),
            options={"only": "navigate,boolean_expressions", "max_new_tokens": 2},
            batch_size=4,
        )
    )
    assert judged.measure == "exact_match"
    assert json.loads(json.dumps(judged.details))["exact_match/navigate"] == 0
    assert len(str(judged).splitlines()) == 4
    for wrong, says in (
        (Evaluate(model=str(stories), task="samsum", data="./none"), "there is no file or folder"),
        (Evaluate(model=str(stories), task="wikitext2", data="none.txt"), "there is no file"),
        (Evaluate(model=str(stories), task="samsum", data="x", num_samples=0), "at least 1"),
    ):
        with pytest.raises(InputError, match=says):
            evaluate(wrong)
