"""The command line: the documented words work verbatim, help is quick, mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools.cli.app import VERBS, main

QUANTIZER = '''
from dataclasses import dataclass

import torch

from llmtools.quant import ALL, Quantizer, TensorSpec, quantizers


@quantizers.register("half_for_tests")
@dataclass(frozen=True)
class Half(Quantizer):
    """Half precision."""

    def layout(self, out_features, in_features):
        return {"values": TensorSpec((out_features, in_features), torch.float16)}

    def quantize(self, weight, hessian=None):
        return {"values": weight.to(torch.float16)}

    def dequantize(self, packed, rows=ALL, dtype=torch.float32):
        return packed["values"][rows].float().to(dtype)


@dataclass(frozen=True)
class Forgetful(Half):
    """Adds noise when it reads: no quantizer."""

    def dequantize(self, packed, rows=ALL, dtype=torch.float32):
        return super().dequantize(packed, rows, dtype) + torch.randn(())
'''


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a command that the user can mend."""
    capsys.readouterr()
    assert run(*args) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def result(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    capsys.readouterr()
    assert run(*args, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def test_quantize_finetune_evaluate_generate_by_the_documented_words(
    stories: Path, tinystories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((tinystories / "held_out.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "Tom had a", "completion": " dog."}\n' * 4, encoding="utf-8")
    q, a = tmp_path / "q", tmp_path / "a"
    words = f"quantize --model {stories} --quantizer optq --bits 3 --group_size 64 --calibration {text}"
    words += " --samples 4 --tokens 64"
    made = result(capsys, *words.split(), "--out", q)
    assert made["modules"] == 35
    assert made["bits_per_weight"] < 4  # type: ignore[operator]
    assert (q / "llmtools.json").exists() and not (q / "run.json").exists()

    words = f"finetune --model {q} --data {data} --out {a} --lora.r 2 --lora.alpha 32 --training.max_steps 2"
    trained = result(capsys, *words.split())
    assert trained["steps"] == 2

    words = f"evaluate --model {q} --adapter {a} --task perplexity --data {text} --context 128"
    judged = result(capsys, *words.split())
    assert 1 < judged["value"] < 512  # type: ignore[operator]
    assert judged["details"]["context"] == 128  # type: ignore[index]
    assert judged["bits_per_weight"] == pytest.approx(made["bits_per_weight"])

    assert run("generate", "--model", q, "--adapter", a, "--prompt", "Once upon: a time", "--max_new_tokens", 4) == 0
    assert capsys.readouterr().out.startswith("Once upon: a time")
    written = result(capsys, "generate", "--adapter", a, "--prompt", "[Once", "--max_new_tokens", 4)
    assert written["model"] == str(q)


def test_check_list_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "rtn", "--options.bits", 3) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == len(out.splitlines()) - 1
    assert run("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("optq", "nf4", "rtn", "perplexity", "text"))
    assert run("list", "optq") == 0
    assert "damping" in capsys.readouterr().out
    assert "torch" in result(capsys, "env")["versions"]  # type: ignore[operator]


def test_a_plug_in_is_checked_quantizes_and_loads(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_for_tests.py").write_text(QUANTIZER, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run("check", "half_for_tests:Half") == 0
    assert run("check", "half_for_tests:Forgetful") == 1
    assert "FAIL  rows" in capsys.readouterr().out
    plugin = ("--plugin", "half_for_tests:Half")
    assert run("quantize", "--model", stories, "--quantizer", "half_for_tests", *plugin, "--out", "q") == 0
    assert run("generate", "--model", "q", *plugin, "--prompt", "The dog", "--max_new_tokens", 3) == 0
    # in a process of its own, the name is known only with the plug-in
    command = [
        sys.executable,
        "-m",
        "llmtools",
        "generate",
        "--model",
        "q",
        "--prompt",
        "The",
        "--max_new_tokens",
        "3",
    ]
    assert subprocess.run([*command, *plugin], check=False).returncode == 0
    without = subprocess.run(command, check=False, capture_output=True, text=True)
    assert without.returncode == 2
    assert "half_for_tests" in without.stderr


def test_a_yaml_gives_options_and_flags_override_it(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"model: {stories}\nquantizer: {{name: rtn, bits: 4, group_size: 32}}\n"
        'overrides: {"*.layers.0.*": null, down_proj: {bits: 8}}\n',
        encoding="utf-8",
    )
    made = result(capsys, "quantize", "--config", config, "--bits", 2, "--out", tmp_path / "q")
    quantizer = made["quantizer"]
    assert (quantizer["bits"], quantizer["group_size"]) == (2, 32)  # type: ignore[index]
    modules = {row["path"]: row["quantizer"]["bits"] for row in made["report"]["modules"]}  # type: ignore[index]
    assert modules["model.layers.1.mlp.down_proj"] == 8
    assert modules["model.layers.1.mlp.up_proj"] == 2
    assert not any(path.startswith("model.layers.0.") for path in modules)


def test_a_printed_configuration_runs(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", "--model", str(stories), "--quantizer", "rtn", "--out", str(tmp_path / "q")]
    assert run(*words, "--options.clip", "false", "--print_config") == 0
    printed = capsys.readouterr().out
    assert "clip: false" in printed
    (tmp_path / "r.yaml").write_text(printed, encoding="utf-8")
    assert result(capsys, "quantize", "--config", tmp_path / "r.yaml")["quantizer"]["clip"] is False  # type: ignore[index]


def test_mistakes_are_one_line(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "q")
    model = ("--model", stories)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("modle: x\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nno\n', encoding="utf-8")
    (tmp_path / "nest.yaml").write_text("lora: {rr: 3}\n", encoding="utf-8")
    for args, says in (
        (("quantise",), "did you mean 'quantize'"),
        (("quantize", *model), "missing: --out"),
        (("quantize", *model, *out, "--bit", 3), "did you mean 'bits'"),
        (("quantize", *model, *out, "--bits", "three"), "--bits three: int or null is expected"),
        (("quantize", *model, *out, "--bits", 5, "--quantizer", "rtn"), "bits"),
        (("quantize", *model, *out, "stray"), "'stray'"),
        (("quantize", *model, *out, "--quantizer", "opqt"), "did you mean 'optq'"),
        (("quantize", *model, *out, "--options.dampin", 1), "did you mean 'damping'"),
        (("quantize", *model, *out, "--quantizer", "optq"), "pass --calibration"),
        (("quantize", *model, *out, "--calibration", "no.txt"), "there is no file no.txt"),
        (("quantize", *model, "--out", tmp_path / "empty", "--quantizer", "rtn"), "--overwrite"),
        (("quantize", "--model", tmp_path / "empty", *out, "--quantizer", "rtn"), "no config.json"),
        (("quantize", "--model", "./nowhere", *out, "--quantizer", "rtn"), "there is no folder ./nowhere"),
        (("quantize", "--config", tmp_path / "none.yaml"), "does not exist"),
        (("quantize", "--config", tmp_path / "bad.yaml"), "did you mean 'model'"),
        (("finetune", "--config", tmp_path / "nest.yaml"), "no key 'lora.rr'; did you mean 'lora.r'"),
        (("finetune", *model, *out, "--data", tmp_path / "bad.jsonl"), "bad.jsonl:2"),
        (("evaluate", *model, "--data", tmp_path / "bad.jsonl"), "bad.jsonl:2"),
        (("evaluate", *model), "needs 'data'"),
        (("evaluate", *model, "--adapter", tmp_path / "empty", "--data", "x.txt"), "there is no file"),
        (("generate", *model), "--prompt"),
        (("generate", "--prompt", "a"), "no model"),
        (("generate", *model, "--adapter", tmp_path / "empty", "--prompt", "a"), "adapter_config.json"),
        (("generate", *model, "--prompt", "a", "--max_new_tokens", 600), "512 positions"),
        (("check", "no_such_module:Thing"), "cannot import"),
        (("check",), "missing: --quantizer"),
        (("list", "optqq"), "did you mean 'optq'"),
    ):
        line = fails(capsys, *args)
        assert says in line, line
    assert not (tmp_path / "q").exists()


def test_ctrl_c_and_a_full_disk_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(recipe: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmtools.recipes.env.env", stopped)
    assert run("env") == 130
    assert capsys.readouterr().err == "llmtools: stopped\n"

    def full(recipe: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("llmtools.recipes.env.env", full)
    assert fails(capsys, "env") == "llmtools env: No space left on device: model.safetensors"
    assert run("env", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_shows_examples_and_imports_nothing_heavy(verb: str | None) -> None:
    args = ["--help"] if verb is None else [verb, "--help"]
    program = (
        "import sys; from llmtools.cli.app import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "llmtools" in done.stdout


def test_every_option_has_a_word_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    from llmtools.recipes.listing import field_docs

    for verb in VERBS.values():
        options = verb.recipe()
        docs = field_docs(options)
        assert {field.name for field in dataclasses.fields(options)} == {name for name, doc in docs.items() if doc}


def deep() -> None:
    deep()


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "bug, code, says",
    [
        (lambda: [][1], 70, "unexpected IndexError: list index out of range (please report"),
        (lambda: {}["x"], 70, "unexpected KeyError: 'x' ("),
        (deep, 70, "unexpected RecursionError: maximum recursion depth exceeded"),
        (lambda: "\udcff".encode(), 70, "unexpected UnicodeEncodeError: 'utf-8' codec"),
        (lambda: raises(RuntimeError("a\nb")), 70, "unexpected RuntimeError: a b ("),
        (lambda: raises(AssertionError()), 70, "unexpected AssertionError: AssertionError ("),
        (lambda: torch.empty(2**50), 2, "not enough memory: "),
        (lambda: raises(torch.OutOfMemoryError("CUDA")), 2, "not enough memory on the device: CUDA"),
        (lambda: raises(MemoryError("x")), 2, "not enough memory x"),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    bug: Callable[[], object], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtools.recipes.env.env", lambda recipe: bug())
    assert run("env") == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith(f"llmtools env: {says}"), line
    assert run("env", "--debug") == code
    assert "Traceback" in capsys.readouterr().err


BUG = """
import sys
import llmtools.recipes.env
from llmtools.cli.app import main

def bug(recipe):
    {bug}

llmtools.recipes.env.env = bug
sys.exit(main(["env", *sys.argv[1:]]))
"""


def program(code: str, *args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_a_message_is_printed_once_where_a_library_gives_the_root_logger_a_handler() -> None:
    done = program("""
import logging, sys
import llmtools.recipes.env
from llmtools.cli.app import main
def env(recipe, *rest):
    logging.basicConfig()
    logging.getLogger("llmtools.progress").info("three of four")
    return {}
llmtools.recipes.env.env = env
sys.argv = ["llmtools", "env"]
sys.exit(main())
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("three of four") == 1


def test_a_mistake_of_ours_ends_a_process_without_a_traceback() -> None:
    done = program(BUG.format(bug="[][1]"))
    assert (done.returncode, done.stdout) == (70, "")
    assert len(done.stderr.splitlines()) == 1
    done = program(BUG.format(bug="[][1]"), "--debug")
    assert done.returncode == 70 and "Traceback" in done.stderr and "in bug" in done.stderr


def test_a_reader_that_goes_away_is_no_mistake() -> None:
    bug = BUG.format(bug="return 'x' * 10_000_000")
    command = f'"{sys.executable}" -c "$0" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, bug], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


LIST = "import sys; from llmtools.cli.app import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    "closed, words, code",
    [((1,), ["list"], 0), ((0,), ["--help"], 0), ((0, 1, 2), ["list", "--help"], 0), ((2,), ["nothing"], 2)],
)
def test_a_closed_stream_is_no_mistake(closed: tuple[int, ...], words: list[str], code: int) -> None:
    shell = f'exec "$@" {" ".join(f"{number}>&-" for number in closed)}'
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", LIST, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr == ""
    assert (done.stdout == "") == (1 in closed or code != 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["env"]])
def test_an_output_that_is_full_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", LIST, *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[0]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_what_is_printed_can_be_printed_in_any_locale() -> None:
    for words in (["--help"], ["finetune", "--help"]):
        done = program(LIST, *words, env={**os.environ, **ASCII})
        assert (done.returncode, done.stderr) == (0, "") and "examples:" in done.stdout
    result = (
        "from dataclasses import make_dataclass; return make_dataclass('Result', ['text'])('\\xe9\\U0001f642\\udcff')"
    )
    for locale in (ASCII, {"PYTHONUTF8": "1"}):
        done = program(BUG.format(bug=result), "--json", env={**os.environ, **locale})
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"text": "é🙂\udcff"}


def test_an_argument_that_is_no_text_is_one_line(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, says in (("a\udcff", "a\\udcff' is not text"), ("a\0b", "NUL")):
        for words in (("generate", "--model", stories, "--prompt", text), ("check", text), ("list", f"--name={text}")):
            assert says in fails(capsys, *words)
        assert says in fails(capsys, "quantize", "--model", stories, "--out", text, "--options.x", text)


@pytest.mark.parametrize("verb", ["quantize", "finetune", "generate", "check", "sweep"])
def test_a_seed_that_no_generator_takes_is_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"quantize": "--model m --out o", "finetune": "--model m --data d --out o", "generate": "--prompt p"}
    words = {**needed, "check": "rtn", "sweep": '--model m --tasks {"t":{"data":"x"}}'}[verb].split()
    name, shown = ("--seeds", "[{}]") if verb == "sweep" else ("--seed", "{}")
    for seed in (2**70, -1, 2**32):
        assert f"{name} {seed}: a whole number from 0 to 4294967295" in fails(
            capsys, verb, *words, name, shown.format(seed)
        )
    (tmp_path / "r.yaml").write_text(f"{name[2:]}: {shown.format(2**70)}\n")
    assert "a whole number from 0" in fails(capsys, verb, *words, "--config", tmp_path / "r.yaml")


def test_numbers_that_no_option_can_have_are_one_line(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (("quantize", "--model", "m", "--out", "o", "--samples", 2**64), "below 2^63"),
        (("check", "rtn", "--options.bits", -(2**64)), "below 2^63"),
        (("check", "rtn", "--options.a.seed", 2**64), "a whole number from 0"),
        (("finetune", "--model", "m", "--data", "d", "--out", "o", "--lora.alpha", "nan"), "--lora.alpha"),
        (("finetune", "--model", "m", "--data", "d", "--out", "o", "--training.learning_rate", ".nan"), "a number is"),
        (("generate", "--model", stories, "--prompt", "a", "--temperature", "1e-300"), "0 (greedy decoding"),
        (("generate", "--model", stories, "--prompt", "a", "--temperature", ".inf"), "temperature=inf"),
    ):
        assert says in fails(capsys, *words)


def test_names_that_no_file_can_have_are_one_line(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x" * 256, "x/" * 3000):
        for words in (
            ("generate", "--model", f"./{name}", "--prompt", "a"),
            ("generate", "--model", stories, "--prompts", f"{name}.txt"),
            ("generate", "--model", stories, "--adapter", name, "--prompt", "a"),
            ("evaluate", "--model", stories, "--data", f"{name}.txt"),
            ("quantize", "--model", stories, "--quantizer", "rtn", "--out", name),
            ("finetune", "--model", stories, "--data", f"{name}.jsonl", "--out", "o"),
            ("list", "--config", name),
            ("push", name, "--repo", "a/b"),
            ("chat", name),
        ):
            assert "name too long" in fails(capsys, *words) or words[0] == "chat"


def examples(verb: str) -> list[list[str]]:
    """The example commands of a verb's help, as a shell gives them to it."""
    commands = VERBS[verb].example.replace("\\\n", " ").splitlines()
    return [shlex.split(command)[1:] for command in commands]


@pytest.mark.parametrize("words", [each for verb in VERBS for each in examples(verb)], ids=" ".join)
def test_the_examples_of_the_help_are_read(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that a verb's help shows makes the recipe that its flags say."""
    (tmp_path / "demo" / "assets").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("model: DIR\nout: QDIR\nquantizer: optq\n", encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text("model: DIR\ntasks: {text: {data: a.txt}}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    verb, made = words[0], list[Any]()

    def note(recipe: Any) -> Any:
        made.append(recipe)
        return recipe

    monkeypatch.setattr(f"llmtools.{VERBS[verb].module}.{VERBS[verb].function}", note)
    assert main(words) == 0
    (recipe,) = made
    for flag, value in pairwise([*words, "--"]):
        name = flag.removeprefix("--")
        if flag.startswith("--") and not value.startswith("--") and name not in ("config", "json"):
            found: Any = recipe
            for key in name.split("."):
                found = found[key] if isinstance(found, dict) else getattr(found, key)
            assert found == float(value) if isinstance(found, float) else str(found).lower() == value.lower()


def test_examples_in_the_help_of_options_are_read_as_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docstrings show flags, too: ``--options.prompt "Q: {question}"``."""
    import dataclasses
    import importlib

    from llmtools.recipes.listing import field_docs

    needed = {"model": "DIR", "data": "a.txt", "out": "OUT", "prompt": "a", "folder": "F", "repo": "a/b", "tasks": "{}"}
    needed |= {"quantizer": "rtn", "calibration": "a.txt"}
    seen = 0
    for name, verb in VERBS.items():
        module = importlib.import_module(f"llmtools.{verb.module}")
        options = getattr(module, verb.options)
        required = {
            field.name
            for field in dataclasses.fields(options)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        for key, doc in field_docs(options).items():
            for flag, value in re.findall(rf'(--{key}\.[\w.]+) ("[^"]*"|[\w./]*\w)', doc):
                made: list[Any] = []
                monkeypatch.setattr(module, verb.function, made.append)
                words = [part for each in sorted(required) for part in (f"--{each}", needed[each])]
                assert main([name, *words, flag, value.strip('"')]) == 0, (name, flag, value)
                found: Any = made[0]
                for part in flag[2:].split("."):
                    found = found[part] if isinstance(found, dict) else getattr(found, part)
                assert str(found).lower() == value.strip('"').lower()
                seen += 1
    assert seen > 5


def test_a_near_miss_of_a_training_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    for word, near in (("max_step", "max_steps"), ("learning_rat", "learning_rate"), ("num_train_epoch", "num_train_")):
        line = fails(capsys, "finetune", "--model", "m", "--data", "d", "--out", "o", f"--{word}", 1)
        assert f"no option --{word}; did you mean '{near}" in line
    assert "did you mean 'data'" in fails(capsys, "finetune", "--model", "m", "--out", "o", "--daat", "d")


def test_a_name_without_room_for_unfinished_work_is_refused_first(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtools.checkpoint.loading.open_model", lambda *args, **kwargs: pytest.fail("loaded"))
    for name in ("x" * 255, "x" * 225, "é" * 127):
        line = fails(capsys, "quantize", "--model", stories, "--quantizer", "rtn", "--out", tmp_path / name)
        assert f"name too long ({len(name.encode())} bytes); at most 2" in line
    assert list(tmp_path.iterdir()) == []


def test_what_all_processes_meet_is_said_by_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, world, printed in ((0, 2, 1), (1, 2, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        capsys.readouterr()
        assert run("env") == 0
        assert bool(capsys.readouterr().out) == printed
        assert run("quantise") == 2
        assert len(capsys.readouterr().err.splitlines()) == printed
    monkeypatch.setattr("llmtools.recipes.env.env", lambda recipe: raises(MemoryError("x")))
    assert run("env") == 2
    assert capsys.readouterr().err == "llmtools env (process 1): not enough memory x\n"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # another machine, with other files
    assert run("quantise") == 2
    assert "(process 1): no such command" in capsys.readouterr().err


def test_torch_writes_nothing_into_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that torch reads when it is imported, which the command line does after the arguments."""
    names = ("TORCH_CPP_LOG_LEVEL", "KINETO_LOG_LEVEL")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    seen: list[Any] = []
    monkeypatch.setattr("llmtools.sweep.runner.sweep", lambda recipe: seen.append([os.environ.get(n) for n in names]))
    words = ("sweep", "--model", "m", "--tasks", "{a: {}}")
    assert run(*words) == 0
    monkeypatch.setenv("KINETO_LOG_LEVEL", "1")
    assert run(*words) == 0 and run(*words, "--debug") == 0
    assert seen == [["ERROR", "99"], ["ERROR", "1"], [None, "1"]]
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ


def test_idle_threads_sleep_soon_where_nothing_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU OpenMP reads the variable when torch loads it, which the command line does after the arguments."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    seen: list[str | None] = []
    for path in ("llmtools.recipes.quantize.quantize", "llmtools.recipes.env.env"):
        monkeypatch.setattr(path, lambda recipe: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    quantize = ("quantize", "--model", "m", "--quantizer", "rtn", "--out", "q")
    assert run(*quantize) == 0 and run("env") == 0 and "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run(*quantize) == 0
    assert seen[0] is not None and int(seen[0]) <= 10**5 and seen[1:] == [None, "7"]


def test_the_profiler_is_silent_with_them() -> None:
    measure = """
import sys
from llmtools.cli.app import _environment
from llmtools.cli.app import _quiet
with _environment(_quiet(["sweep"])):
    import torch
    x = torch.randn(9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        del x
        torch.randn(9)
    assert any(event.name() == "[memory]" for event in profile.profiler.kineto_results.events())
"""
    done = program(measure)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_list_is_of_names_for_use(capsys: pytest.CaptureFixture[str]) -> None:
    from llmtools.quant import external, quantizers

    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0] for line in lines if line.startswith("  ")}
    formats = {name for name in quantizers.names() if quantizers.get(name).__module__ == external.__name__}
    assert formats and not formats & shown
    assert set(quantizers.names()) - formats < shown
    assert all(len(line.split("  ", 2)) == 3 for line in lines if line.startswith("  "))  # a name and what it is
    assert run("list", *sorted(formats)[:1]) == 0
