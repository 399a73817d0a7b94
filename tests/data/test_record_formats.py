"""Files as people have them: read, or refused in one line that says what to do; and what a row becomes in tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtools.data.tasks import make_task
from llmtools.data.tasks.base import NullField, Template
from llmtools.data.tasks.text import rows_of_one_format
from llmtools.data.text_io import read_documents, read_rows
from llmtools.data.tokens import tokenized
from llmtools.errors import InputError

PAIR = {"prompt": "Say hi:", "completion": " hi"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps(PAIR)),
        ("bom.jsonl", "\ufeff" + json.dumps(PAIR)),
        ("upper.JSONL", json.dumps(PAIR) + "\n\n"),
        ("array.json", json.dumps([PAIR])),
        ("bom.json", "\ufeff" + json.dumps([PAIR])),
        ("lines.json", json.dumps(PAIR)),
        ("crlf.jsonl", json.dumps(PAIR) + "\r\n"),
        ("a.csv", "prompt,completion\nSay hi:, hi\n"),
        ("quoted.csv", '\ufeffprompt,completion\r\n"Say hi:"," hi"\r\n'),
        ("a.tsv", "prompt\tcompletion\nSay hi:\t hi\n"),
    ],
)
def test_the_same_row_is_read_from_every_kind_of_file(tmp_path: Path, name: str, text: str) -> None:
    assert rows_of_one_format(write(tmp_path / name, text)) == [PAIR]


def test_parquet_is_read_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist([PAIR, PAIR]), tmp_path / "a.parquet")
    assert rows_of_one_format(tmp_path / "a.parquet") == [PAIR, PAIR]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    with pytest.raises(InputError, match="not a complete Parquet file"):
        read_rows(tmp_path / "b.parquet")


def test_text_loses_its_byte_order_mark(tmp_path: Path) -> None:
    assert read_documents(write(tmp_path / "a.txt", "\ufeffOnce."))[0] == "Once."


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": "yo"}]},
    ],
    ids=["ShareGPT", "parts"],
)  # fmt: skip
def test_chats_in_other_spellings_are_the_same_chat(tmp_path: Path, row: dict[str, Any]) -> None:
    assert rows_of_one_format(write(tmp_path / "a.jsonl", json.dumps(row))) == [CHAT]


@pytest.mark.parametrize("completion", ["yo", [{"role": "assistant", "content": "yo"}]], ids=["string", "messages"])
def test_of_a_prompt_that_is_a_chat_only_the_completion_is_learned(tmp_path: Path, completion: Any) -> None:
    from llmtools.train.rows import turns as turns_of

    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "hi"},
    ]
    rows = rows_of_one_format(write(tmp_path / "a.jsonl", json.dumps({"prompt": prompt, "completion": completion})))
    (turn,) = turns_of(rows)
    assert turn["completion"] == [{"role": "assistant", "content": "yo"}] and len(turn["prompt"]) == 3


def test_an_answer_of_weight_zero_is_not_learned(tmp_path: Path) -> None:
    from llmtools.train.rows import turns as turns_of

    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "good", "weight": 1},
    ]  # fmt: skip
    turns = turns_of(rows_of_one_format(write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))))
    assert [turn["completion"][0]["content"] for turn in turns] == ["good"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"prompt": "smile \ud83d", "completion": " ok"}), "a.jsonl:1: .*half a character"),
        (json.dumps({"conversations": [{"from": "hooman", "value": "hi"}]}), "'hooman'.*did you mean 'human'"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "only parts of text"),
        (json.dumps({"instruction": "x", "output": "y"}), "--task alpaca"),
        (json.dumps({"question": "x", "answer": "y"}), r"--options\.prompt \"\{question\}\""),
        (json.dumps({"prompt": [{"role": "user", "content": "x"}]}), "needs a \"completion\""),
        ("[" * 100_000, "cannot be read|not JSON"),
    ],
    ids=["surrogate", "speaker", "image", "alpaca", "template", "no completion", "deep"],
)  # fmt: skip
def test_what_cannot_be_learned_is_one_line_with_a_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of_one_format(write(tmp_path / "a.jsonl", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1\n", "does not have the 2 columns"), ("a,b\n1,2,3\n", "does not have the 2 columns"), ('a\n"x', "CSV")],
)  # fmt: skip
def test_a_damaged_csv_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path / "a.csv", text))


# ---- null ------------------------------------------------------------------------------------------------------------


def test_null_is_never_the_word_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NullField, match="'q' is null"):
        Template("Q: {q}", " {a}").fill({"q": None, "a": "x"})
    records = [
        {"instruction": "Say hi.", "input": None, "output": "hi"}, {"instruction": None, "input": "", "output": "y"},
        {"instruction": "Say hi.", "input": "", "output": None}, {"instruction": "Say hi.", "input": "", "output": " "},
    ]  # fmt: skip
    file = write(tmp_path / "train.json", json.dumps(records))
    with caplog.at_level(logging.WARNING, "llmtools"):
        rows = make_task("alpaca", data=str(file)).train()
    assert len(rows) == 1 and "None" not in rows[0]["prompt"] + rows[0]["completion"]
    assert "3 of 4 records have null or an empty answer and are left out: 2, 3, 4" in caplog.text
    with pytest.raises(InputError, match="nothing is left"):
        make_task("alpaca", data=str(write(tmp_path / "b.json", json.dumps(records[1:])))).train()


# ---- tokens ----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m['role'] }}] "
    "{{ m['content'] or '' }}{% if m.tool_calls %} CALLS {{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def ending(tokenizer: Any) -> Any:
    """The tokenizer as one that writes start and end around every text."""
    from tokenizers.processors import TemplateProcessing

    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("kind", ["plain", "starts", "ends"])
def test_there_is_one_start_token_and_one_end_token(tokenizer: Any, kind: str) -> None:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if kind == "ends":
        assert tokenizer("x").input_ids[-1] != end
        tokenizer = ending(tokenizer)
        assert tokenizer("x").input_ids[-1] == end
    prompt = ("<s>" if kind == "starts" else "") + "Tell me about it."
    pair = tokenized({"prompt": prompt, "completion": " the cat"}, tokenizer)
    text = tokenized({"text": prompt + " the cat"}, tokenizer)
    assert pair.input_ids == text.input_ids and text.completion_mask is None
    assert pair.input_ids.count(start) == 1 and pair.input_ids.count(end) == 1 and pair.input_ids[-1] == end
    learned = [token for token, mask in zip(pair.input_ids, pair.completion_mask or (), strict=True) if mask]
    assert tokenizer.decode(learned).strip() == "the cat</s>"
    assert tokenized({"text": "done</s>"}, tokenizer).input_ids.count(end) == 1


def test_prompts_have_no_end_token_in_generation(tokenizer: Any) -> None:
    from llmtools.data.generation import text_ids

    plain = text_ids(tokenizer, "Once upon a time", "so</s>")
    assert text_ids(ending(tokenizer), "Once upon a time", "so</s>")[0] == plain[0]


def test_a_template_without_an_end_gets_one_and_says_so(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    example = tokenized(row, tokenizer)
    assert example.end_appended and example.input_ids[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE.replace("\n{% endfor %}", "</s>\n{% endfor %}")
    example = tokenized(row, tokenizer)
    assert not example.end_appended and tokenizer.eos_token_id in example.input_ids


def test_tools_stand_before_the_chat_and_calls_have_their_own_arguments_only(tokenizer: Any, tmp_path: Path) -> None:
    from llmtools.train.rows import turns as turns_of

    tokenizer.chat_template = TEMPLATE
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": arguments}}]}], "tools": tools}
        for arguments in ({"x": 1}, {"y": "s"}, {"x": "a string"})
    ]  # fmt: skip
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for turn, arguments in zip(
        turns_of(rows_of_one_format(file)), ('{"x": 1}', '{"y": "s"}', '{"x": "a string"}'), strict=True
    ):
        text = tokenizer.decode(tokenized(turn, tokenizer).input_ids)
        assert "clock" in text.partition("[user]")[0]
        assert arguments in text and "null" not in text


def test_greedy_is_greedy_whatever_the_model_says_of_itself(stories: Path) -> None:
    import llmtools
    from llmtools.data.generation import complete, generate_completions

    model, tokenizer = llmtools.load(stories)
    prompt = ["Once upon a time", "Tom had"]
    expected = complete(model, tokenizer, prompt, max_new_tokens=12)
    for change in (
        {"repetition_penalty": 1.3}, {"suppress_tokens": [402, 10, 11]}, {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True}, {"stop_strings": ["."]}, {"max_time": 1e-4}, {"num_beams": 3},
        {"forced_eos_token_id": 2}, {"min_new_tokens": 30}, {"exponential_decay_length_penalty": (2, 1.5)},
    ):  # fmt: skip
        model.generation_config = type(model.generation_config)(eos_token_id=2, bos_token_id=1, **change)
        own = model.generation_config
        assert complete(model, tokenizer, prompt, max_new_tokens=12) == expected, change
        assert model.generation_config is own
    assert [one.tokens for one in generate_completions(model, tokenizer, prompt, max_new_tokens=12)] == [12, 12]
