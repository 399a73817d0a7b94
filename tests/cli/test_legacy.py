"""The options of published releases mean today's options, and those without a successor say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtools.cli.app import _names, main, read_recipe
from llmtools.cli.legacy import GONE, OLD, accumulation, translated
from llmtools.cli.verbs import VERBS
from llmtools.errors import InputError
from llmtools.options import FORMER_NAMES


def today(verb: str, words: str) -> str:
    return " ".join(translated(verb, words.split(), ["model", "bits", "group_size"]))


def test_every_old_word_becomes_todays() -> None:
    for verb, old, new in (
        ("quantize", "--model M --bits 3 --groupsize 64 --save Q", "--model M --bits 3 --group_size 64 --out Q"),
        (
            "quantize",
            "--dataset c4 --nsamples 128 --percdamp .01",
            "--calibration c4 --num_samples 128 --options.damping .01",
        ),
        ("quantize", "--act-order --nearest", "--options.act_order true --quantizer rtn"),
        ("quantize", "--act_order false --nearest=false", "--options.act_order false"),
        ("quantize", "--wbits=4", "--bits 4"),
        ("finetune", "--dataset d.json --adapter A", "--data d.json --out A --task alpaca"),
        ("finetune", "--dataset d.json --data-type samsum", "--data d.json --task samsum"),
        ("finetune", "--dataset d.json --task samsum", "--task samsum --data d.json"),
        ("finetune", "--task=samsum --dataset d.json", "--task=samsum --data d.json"),
        ("finetune", "--config samsum_lora --dataset d.json", "--config samsum_lora --data d.json"),
        ("finetune", "--lora-out-dir A --ds_type alpaca", "--out A --task alpaca"),
        (
            "finetune",
            "--mbatch_size 2 --batch_size 16",
            "--training.per_device_train_batch_size 2 --training.gradient_accumulation_steps 8",
        ),
        (
            "finetune",
            "--batch_size 4",
            "--training.gradient_accumulation_steps 4 --training.per_device_train_batch_size 1",
        ),
        (
            "finetune",
            "--epochs 3 --lr 2e-4 --cutoff_len 256 --warmup_steps 50",
            "--training.num_train_epochs 3 --training.learning_rate 2e-4 --training.max_length 256 "
            "--training.warmup_steps 50",
        ),
        ("finetune", "--lora_r 8 --lora_alpha 16 --lora_dropout 0.1", "--lora.r 8 --lora.alpha 16 --lora.dropout 0.1"),
        (
            "finetune",
            "--val_set_size 0.2 --save_steps 5 --save_total_limit 3 --logging_steps 1",
            "--validation 0.2 --training.save_steps 5 --training.save_total_limit 3 --training.logging_steps 1",
        ),
        ("finetune", "--resume_checkpoint --groupsize 64", "--resume true"),
        ("generate", "--model M --max-length 20 --groupsize 64", "--model M --max_new_tokens 20"),
        ("generate", "--model arch --weights Q --prompt x", "--prompt x --model Q"),
        ("generate", "--model=arch --weights Q/model.safetensors", "--model Q"),
        ("evaluate", "--nsamples 3", "--nsamples 3"),
    ):
        assert today(verb, old) == new, old


def test_an_instruction_is_asked_in_alpacas_words() -> None:
    words = translated("generate", ["--instruction", "Name {a} colour."], [])
    assert words[0] == "--prompt"
    assert "### Instruction:\nName {a} colour.\n\n### Response:" in words[1]
    assert words[2:] == ["--raw", "true"]


def test_todays_words_win_and_unknown_ones_pass() -> None:
    assert translated("quantize", ["--save", "x"], ["save"]) == ["--save", "x"]
    assert translated("quantize", ["--sae", "x", "--dry-run"], []) == ["--sae", "x", "--dry-run"]
    assert not {new.partition("=")[0] for table in OLD.values() for new in table.values()} & set(GONE)


def test_what_cannot_be_kept_says_what_to_do() -> None:
    for verb, words, says in (
        ("generate", "--tokenizer T", "in the model's folder"),
        ("generate", "--top_k 50", "--top_p"),
        ("generate", "--min-length 10", "not supported"),
        ("generate", "--weights llama.pt", "pickled weights are not opened"),
        ("quantize", "--groupsize", "a value is expected"),
        ("quantize", "--groupsize --nearest", "a value is expected"),
        ("quantize", "--nsamples 1 --nsamples 2", "given twice"),
        ("finetune", "--batch_size 2 --mbatch_size 4", "smaller than one step"),
        ("finetune", "--batch_size two", "whole numbers"),
        ("finetune", "--batch_size ²", "whole numbers"),
        ("finetune", f"--batch_size {'9' * 5000}", "whole numbers"),
        ("finetune", "--val_set_size 2000", "fraction of the rows"),
    ):
        with pytest.raises(InputError, match=says):
            today(verb, words)


def test_batches_are_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accumulation(128, 4, 2) == 16
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "accumulation_steps 4" in today("finetune", "--batch_size 16 --mbatch_size 2")


def test_old_commands_run(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "Say hello.", "input": "", "output": f"Hello {n}!"} for n in range(4)]
    data, q, a = tmp_path / "alpaca.json", tmp_path / "q", tmp_path / "a"
    data.write_text(json.dumps(rows), encoding="utf-8")
    words = f"quantize --model {stories} --save {q} --bits 4 --groupsize 32 --nearest"
    assert main(words.split()) == 0
    words = f"finetune --model {q} --dataset {data} --adapter {a} --mbatch_size 1 --batch_size 2 --epochs 1 --lora_r 2"
    assert main(words.split()) == 0
    run = json.loads((a / "llmtools.json").read_text())
    assert (run["recipe"]["task"], run["recipe"]["lora"]["r"], run["result"]["steps"]) == ("alpaca", 2, 2)
    assert "| trained on | alpaca.json (task alpaca), examples 4, steps 2, seed 0 |" in (a / "README.md").read_text()
    assert "| calibration data | none: the quantizer uses no data |" in (q / "README.md").read_text()
    capsys.readouterr()
    words = f"generate --model {stories} --weights {q} --adapter {a} --max-length 4 --instruction"
    assert main([*words.split(), "Say hello."]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Below is an instruction")
    assert "published options: --weights --max_length --instruction" in shown.err


def test_words_of_transformers_scripts_work_for_every_verb_that_has_the_option() -> None:

    from llmtools.cli.app import _names
    from llmtools.cli.verbs import VERBS

    for verb, found in VERBS.items():
        known = _names(found.recipe())
        for word, option in (
            ("model_name_or_path", "model"),
            ("output_dir", "out"),
            ("adapter_name_or_path", "adapter"),
        ):
            wanted = [f"--{option}", "x"] if option in known else [f"--{word}", "x"]
            assert translated(verb, [f"--{word}", "x"], known) == wanted, verb
    assert today("finetune", "--load_in_4bit --dataset_name d --max_seq_length 64 --lora_target_modules q_proj") == (
        "--load nf4 --data d --training.max_length 64 --lora.target_modules q_proj"
    )
    assert today("finetune", "--load_in_8bit true --overwrite_output_dir") == "--load int8 --overwrite true"


@pytest.mark.parametrize("verb", sorted(set(FORMER_NAMES) - {"sweep"}))
def test_former_names_of_options_stay_as_aliases(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = VERBS[verb].recipe()
    needed = {"model": "m", "data": "d", "out": "o"}
    base = [word for name in needed if name in _names(options) for word in (f"--{name}", needed[name])]
    for former, name in FORMER_NAMES[verb].items():
        file = tmp_path / f"{former}.yaml"
        file.write_text(f"{former}: 7\n")
        newer = tmp_path / f"{name}.yaml"
        newer.write_text(f"config: {file.name}\n{name}: 8\n")
        for words, value in (
            ([f"--{former}", "5"], 5),
            ([f"--{former}=5", f"--{name}", "6"], 6),
            ([f"--{name}", "6", f"--{former}", "5"], 5),
            (["--config", str(file)], 7),
            (["--config", str(newer)], 8),
            (["--config", str(newer), f"--{former}", "5"], 5),
        ):
            assert getattr(read_recipe(verb, options, [*base, *words]), name) == value, words
        with pytest.raises(InputError, match=f"--{name} x: int or null|--{name} x: int"):
            read_recipe(verb, options, [*base, f"--{former}", "x"])
    assert main([verb, "--help_all"]) == 0
    shown = capsys.readouterr().out.split()
    assert all(f"--{name}" in shown and f"--{former}" not in shown for former, name in FORMER_NAMES[verb].items())


def test_former_names_within_a_sweep_are_overridden_by_either_name(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: m\nquantize: {samples: 1, tokens: 2}\ntasks: {a: {limit: 3, evaluate: {limit: 4, context: 5}}}\n"
    )
    words = ["--quantize.num_samples", "6", "--quantize.tokens", "7", "--tasks.a.evaluate.limit", "8"]
    made = read_recipe("sweep", VERBS["sweep"].recipe(), ["--config", str(file), *words])
    assert made.quantize == {"num_samples": 6, "max_length": 7}
    assert made.tasks == {"a": {"num_samples": 3, "evaluate": {"num_samples": 8, "max_length": 5}}}
    file.write_text("model: m\ntasks: {}\nquantize: {samples: 1, num_samples: 2}\n")
    with pytest.raises(InputError, match=r"sweep.yaml: quantize.samples is the former name of quantize.num_samples"):
        read_recipe("sweep", VERBS["sweep"].recipe(), ["--config", str(file)])
