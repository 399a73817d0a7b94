"""YAML files and flags are data: they bring no code along, cost no memory, and prose in them stays prose."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtools.cli.app import VERBS, _parse, _parser, main
from llmtools.cli.arguments import _hints
from llmtools.errors import InputError
from llmtools.recipes import plain_yaml as config
from llmtools.recipes.plain_yaml import parse_yaml, read_value

SPEC = {"class_path": "canary.Thing", "init_args": {}}
SHAPES: list[Any] = [
    SPEC,
    json.dumps(SPEC),
    "canary.Thing",
    "canary:Thing",
    [SPEC],
    {"a": [{"b": SPEC}]},
    {"a": json.dumps(SPEC)},
    {"a.class_path": "canary.Thing"},
    {"name": "canary:Thing"},
    {"a": {"task": "canary:Thing", "plugin": ["canary:Thing"]}},
]
MADE = {"model": "./nowhere", "out": "never", "data": "nowhere", "repo": "a/b", "folder": "nowhere", "format": "dense"}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the module `canary` was imported; the current folder holds that module."""
    (tmp_path / "canary.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'dead')!r}).touch()\nclass Thing: pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path / "dead"
    sys.modules.pop("canary", None)


def options_of(verb: str) -> type[Any]:
    return VERBS[verb].recipe()


def parsed(verb: str, *args: str) -> Any:
    return _parse(_parser(verb, VERBS[verb], options_of(verb)), verb, options_of(verb), list(args))


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and "unexpected" not in line
    return line


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "env"])
def test_no_option_of_a_yaml_or_flag_imports_what_it_names(verb: str, canary: Path) -> None:
    """Each option in each shape that may be taken for a class: parsing alone has imported modules."""
    required = {
        field.name: {"t": {"data": "x"}} if field.name == "tasks" else MADE.get(field.name, "rtn")
        for field in dataclasses.fields(options_of(verb))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    words = [word for key, value in required.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    parser = _parser(verb, VERBS[verb], options_of(verb))
    for name, _ in _hints(options_of(verb)):
        for shape in SHAPES:
            Path("recipe.yaml").write_text(yaml.safe_dump({**required, name: shape}))
            text = shape if isinstance(shape, str) else json.dumps(shape)
            more = [[*words, f"--{name}{key}.class_path=canary.Thing"] for key in ("", ".a")] if shape is SPEC else []
            for args in (["--config", "recipe.yaml"], [*words, f"--{name}", text], *more):
                try:
                    _parse(parser, verb, options_of(verb), args)
                except InputError as error:
                    assert str(error)
                assert not canary.exists(), args


def test_class_path_is_refused_wherever_it_stands(canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("outer.yaml").write_text("config: inner.yaml\nmodel: x\nout: y\n")
    Path("inner.yaml").write_text("options: {bits: {class_path: canary.Thing}}\n")
    Path("group.yaml").write_text("class_path: canary.Thing\n")
    Path("sweep.yaml").write_text("model: x\ntasks: {t: {options: {a: [{class_path: canary.Thing}]}}}\n")
    for args in (
        ("quantize", "--config", "inner.yaml"),
        ("quantize", "--config", "outer.yaml"),
        ("quantize", "--model", "x", "--out", "y", "--options", json.dumps({"a": SPEC})),
        ("quantize", "--model", "x", "--out", "y", "--options.class_path", "canary.Thing"),
        ("quantize", "--model", "x", "--out", "y", "--options.a", json.dumps(SPEC)),
        ("quantize", "--model", "x", "--out", "y", "--quantizer", json.dumps(SPEC)),
        ("quantize", "--model", "x", "--out", "y", "--finetune_blocks", "group.yaml"),
        ("finetune", "--model", "x", "--data", "d", "--out", "y", "--lora", json.dumps(SPEC)),
        ("finetune", "--model", "x", "--data", "d", "--out", "y", "--training.a.class_path", "canary.Thing"),
        ("sweep", "sweep.yaml"),
    ):
        assert "class_path is not an option" in fails(capsys, *args)
    assert not canary.exists()


def bomb(levels: int, line: str) -> str:
    """Each level names the one before it nine times."""
    rest = "".join(f"a{n}: &a{n} {line.format(', '.join([f'*a{n - 1}'] * 9))}\n" for n in range(1, levels))
    return f"a0: &a0 {{k: v}}\n{rest}"


@pytest.mark.parametrize(
    "text, says",
    [
        (bomb(12, "[{}]"), "more than 100000 values"),
        (bomb(12, "{{{{<<: [{}]}}}}".replace("{{", "{").replace("}}", "}")), "more than 100000 values"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), "more than 50 nested lists"),
        ("a: &a [*a]\n", "more than 50 nested lists"),
        ("options: " + "[" * 200_000, "more than 50 nested lists"),
        ("options: " + "{a: " * 200_000, "more than 50 nested lists"),
        ("- " * 200_000, "more than 50 nested lists"),
        ('{"options": ' + "[" * 60 + "]" * 60 + "}", "more than 50 nested lists"),
        ("options: !!python/object/apply:os.system [touch PWNED]\n", "!!python/object/apply:os.system"),
        ("options: !!python/name:os.system\n", "without tags"),
        ("a: !mine 1\n", "!mine"),
        ("- a\n", "a mapping (key: value) is expected, not ['a']"),
        ("text\n", "a mapping (key: value) is expected, not 'text'"),
        ("", "a mapping (key: value) is expected, not None"),
        ("a: [1\nb: 2\n", "line 2"),
        ("a: b: c\n", "line 1, column 5"),
        ("a:\n\t- b\n", "line 2"),
        ("a: *b\n", "undefined alias"),
        ("a: 1\n---\nb: 1\n", "another document"),
        ("{1: 2}\n", "the key 1 is not a string"),
        ("[a]: b\n", "unhashable"),
        ('model: "a\\0b"\n', "NUL"),
        (f"bits: {'9' * 5000}\n", "digits"),
        ("a: \x07\n", "control characters"),
    ],
)
def test_a_damaged_or_hostile_yaml_is_one_line_with_its_name(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    line = fails(capsys, "quantize", "--config", file)
    deep = says.startswith("more than 50") and "nesting depth" in line  # libyaml has a limit of its own
    assert str(file) in line and (says in line or deep) and len(line) < 500, line


def test_a_file_that_is_no_text_is_one_line_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "large").write_bytes(b"a: " + b"x" * config.MOST_BYTES)
    (tmp_path / "loop").write_text("config: loop\n")
    (tmp_path / "back").write_text("config: forth\n")
    (tmp_path / "forth").write_text("config: back\n")
    (tmp_path / "lost").write_text("config: nowhere\n")
    (tmp_path / "odd").write_text("config: [a]\n")
    for name, says in (
        ("binary", "UTF-8"),
        ("large", "more than 1048576 bytes"),
        ("loop", "this file itself"),
        ("back", "this file itself"),
        ("lost", "nowhere does not exist"),
        ("odd", "not ['a']"),
        (".", "is a folder"),
        ("none", "does not exist"),
        ("x" * 300, "File name too long"),
    ):
        line = fails(capsys, "list", "--config", tmp_path / name)
        assert says in line and str(tmp_path) in line, line


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_all_of_it_holds_without_the_c_library_of_yaml(loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "CSafeLoader", getattr(yaml, loader))
    config._loader.cache_clear()
    try:
        assert parse_yaml("a: &x {b: 1e-4}\nc: *x\nd: 1_000\ne: 2020-01-01\nf: 12:30\ng: 010\nh: no\ni: ~", "f") == {
            "a": {"b": 1e-4},
            "c": {"b": 1e-4},
            "d": 1000,
            "e": "2020-01-01",
            "f": "12:30",
            "g": 10,
            "h": False,
            "i": None,
        }
        for text in ("[" * 100_000, "- " * 100_000, bomb(12, "[{}]"), "a: !!python/name:os.system"):
            with pytest.raises(InputError):
                parse_yaml(text, "f")
        assert read_value("[a] # b") == "[a] # b"
        assert read_value("[a, {b: 1}]") == ["a", {"b": 1}]
    finally:
        config._loader.cache_clear()


@pytest.mark.parametrize(
    "text, value",
    [
        *((text, text) for text in ("Q: {q}", "# {q}", "- {q}", "{q} # why", "{q}", "{a, b}", "[{q}]", "[x] # [y]")),
        *((text, text) for text in ("[INST] {q} [/INST]", "yes", "no", "on", "off", "~", "", " ", "-", "@file", "*a*")),
        *((text, text) for text in ("&a b", "!x", "%x", "| a", "> a", "'a'", '"a"', "a: b", "a:", "? a", "12:30")),
        *(
            (text, text)
            for text in ("2020-01-01", "1 2", "1.2.3", "0x10", "²", "inf", "--- x", "{{", "[1, 2", "a\nb: c")
        ),
        ("1", 1),
        ("-1", -1),
        ("1_000", 1000),
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("[a, 1]", ["a", 1]),
        ("{a: null}", {"a": None}),
        ('{"a": [true]}', {"a": [True]}),
        ("[]", []),
        ("{}", {}),
    ],
)
def test_a_flags_text_is_a_value_only_where_it_looks_like_one(text: str, value: object) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)
    assert parsed("check", "--quantizer", "rtn", "--options.x", text).options == {"x": value}
    assert parsed("check", "--quantizer", "rtn", f"--options.x={text}").options == {"x": value}


@given(st.text(max_size=30))
def test_prose_is_never_anything_else(text: str) -> None:
    bare = text.strip()
    found = read_value(f"{text}: say {{it}}")
    assert found == f"{text}: say {{it}}"
    if not (bare[:1] in "[{" or bare[:1].isdigit() or bare[:1] in "+-." or bare.lower() in ("true", "false", "null")):
        assert read_value(text) == text


def test_what_a_task_declares_as_text_stays_as_it_was_typed() -> None:
    words = ["--model", "m", "--data", "d", "--out", "o"]
    for text in ("[INST]", "42", "1e-4", "true", "{a: b}", "Q: {q}", "007"):
        recipe = parsed("finetune", *words, "--options.prompt", text, "--options.completion=yes")
        assert recipe.options == {"prompt": text, "completion": "yes"}
    assert parsed("finetune", *words, "--options.prompt", "null").options == {"prompt": None}


def test_what_a_yaml_quotes_is_text(tmp_path: Path) -> None:
    options = {"a": "1", "b": "null", "c": "Q: {q}", "d": ["true", {"e": "1e-4"}], "f": 1, "g": None, "h": "[x]"}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"model": "m", "data": "d", "out": "o", "training": options, "lora.options": options}))
    recipe = parsed(
        "finetune", "--config", str(file), "--training.f", "2", "--training.x.y", "3", "--training.x.z", "4"
    )
    assert recipe.lora.options == options
    assert recipe.training == {**options, "f": 2, "x": {"y": 3, "z": 4}}


def test_files_and_flags_count_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: m\nout: o\nbits: 2\nseed: 7\noptions: {a: 1, b: 2}\n")
    (tmp_path / "more.yaml").write_text("config: base.yaml\nbits: 3\nfinetune_blocks: {epochs: 1}\n")
    more, base = str(tmp_path / "more.yaml"), str(tmp_path / "base.yaml")
    recipe = parsed("quantize", "--bits", "8", "--config", more, "--options.b", "5", "--finetune_blocks.batch", "2")
    assert (recipe.bits, recipe.seed, recipe.options) == (3, 7, {"a": 1, "b": 5})
    assert (recipe.finetune_blocks.epochs, recipe.finetune_blocks.batch) == (1, 2)
    recipe = parsed("quantize", "--options.c", "5", "--config", base, "--options", "{d: 1}", "--bits=4", "--sequential")
    assert (recipe.bits, recipe.options, recipe.sequential) == (4, {"d": 1}, True)
    (tmp_path / "group.yaml").write_text("{epochs: 4}\n")
    words = ["--model", "m", "--out", "o", "--finetune_blocks"]
    for text in (str(tmp_path / "group.yaml"), "{epochs: 4}", "epochs: 4", '{"epochs": 4}'):
        assert parsed("quantize", *words, text).finetune_blocks.epochs == 4


def test_a_scalar_where_a_mapping_is_expected_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    for verb, option in (("quantize", "finetune_blocks"), ("finetune", "lora"), ("finetune", "training")):
        for value in (True, 3, "text", [1], "os.path"):
            file.write_text(yaml.safe_dump({"model": "m", "data": "d", "out": "o", option: value}))
            assert option in fails(capsys, verb, "--config", file)
            words = ["--model", "m", "--out", "o", *(["--data", "d"] if verb == "finetune" else [])]
            assert f"--{option}" in fails(capsys, verb, *words, f"--{option}", str(value))


@pytest.mark.parametrize(
    "verb, contents",
    [
        ("quantize", {"plugin": "canary:Thing"}),
        ("quantize", {"plugin": ["canary:Thing"]}),
        ("quantize", {"quantizer": "canary:Thing"}),
        ("quantize", {"quantizer": {"name": "canary:Thing"}}),
        ("quantize", {"overrides": {"*": {"name": "canary:Thing"}}}),
        ("finetune", {"task": "canary:Thing"}),
        ("finetune", {"lora": {"options": {"megatron_core": "canary"}}}),
        ("finetune", {"lora.options.megatron_core": "canary"}),
        ("finetune", {"training": {"model_init_kwargs": {"trust_remote_code": True}}}),
        ("evaluate", {"task": "canary:Thing"}),
        ("evaluate", {"trust_remote_code": True}),
        ("evaluate", {"trust_remote_code": "true"}),
        ("evaluate", {"harness": "./task.yaml, arc_easy"}),
        ("evaluate", {"harness": ["arc_easy", "task.yml"]}),
        ("evaluate", {"options": {"use_cache": "file"}}),
        ("evaluate", {"options": {"confirm_run_unsafe_code": True}}),
        ("generate", {"trust_remote_code": True}),
        ("check", {"quantizer": "canary:Thing"}),
        ("list", {"name": "canary:Thing"}),
        ("plan", {"plugin": "canary:Thing"}),
        ("sweep", {"plugin": "canary:Thing"}),
        ("sweep", {"tasks": {"t": {"task": "canary:Thing"}}}),
        ("sweep", {"tasks": {"t": {"finetune": {"trust_remote_code": True}}}}),
        ("sweep", {"quantizers": [{"name": "canary:Thing"}]}),
    ],
)
def test_what_has_code_run_counts_on_the_command_line_alone(
    verb: str, contents: dict[str, Any], canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(contents))
    Path("outer.yaml").write_text("config: recipe.yaml\n")
    for file in ("recipe.yaml", "outer.yaml"):
        line = fails(capsys, verb, "--config", file)
        assert "recipe.yaml: " in line and "--trust_plugins true" in line, line
    Path("recipe.yaml").write_text(yaml.safe_dump({**contents, "trust_plugins": True}))
    assert "trust_plugins can be given on the command line only" in fails(capsys, verb, "--config", "recipe.yaml")
    assert not canary.exists()


def test_what_the_command_line_names_or_trusts_counts_in_a_yaml(
    canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "m", "--out", "o"]
    Path("recipe.yaml").write_text("quantizer: canary:Thing\nplugin: other:Thing\ntrust_remote_code: true\n")
    own = ["--plugin", "canary:Thing", "--trust_remote_code", "false"]
    recipe = parsed("quantize", *own, "--config", "recipe.yaml", *words)
    assert (recipe.quantizer, recipe.plugin, recipe.trust_remote_code) == ("canary:Thing", "canary:Thing", False)
    for flag in (["--trust_plugins", "true"], ["--trust_plugins=true"], ["--trust_plugins"]):
        recipe = parsed("quantize", "--config", "recipe.yaml", *words, *flag)
        assert (recipe.plugin, recipe.trust_remote_code) == ("other:Thing", True)
    with pytest.raises(InputError, match="trust_plugins true"):
        parsed("quantize", "--config", "recipe.yaml", *words, "--trust_plugins", "false", "--overwrite", "true")
    with pytest.raises(InputError, match="true or false"):
        parsed("quantize", "--config", "recipe.yaml", *words, "--trust_plugins=perhaps")
    Path("plain.yaml").write_text("quantizer: rtn\nplugin: null\ntrust_remote_code: false\n")
    assert parsed("quantize", "--config", "plain.yaml", *words).quantizer == "rtn"


def test_the_environment_gives_no_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("bits: 2\n")
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("LLMTOOLS_QUANTIZE", "LLMTOOLS", "QUANTIZE"):
        monkeypatch.setenv(f"{name}_CONFIG", str(tmp_path / "recipe.yaml"))
        monkeypatch.setenv(f"{name}_BITS", "2")
        monkeypatch.setenv(f"{name}__BITS", "2")
    assert parsed("quantize", "--model", "m", "--out", "o").bits is None
