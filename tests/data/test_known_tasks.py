"""The tasks of the published experiments: their prompts to the byte, their splits, truncation, and what scores 1."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from llmtools.data.generation import choose, complete
from llmtools.data.metrics import rouge
from llmtools.data.tasks import make_task
from llmtools.data.tasks.base import answer, prompt_text
from llmtools.data.tasks.bbh import without_reasoning
from llmtools.errors import InputError

ASSETS = Path(__file__).parent.parent / "assets"
DATA = {name: str(ASSETS / name) for name in ("alpaca", "code_alpaca", "samsum", "mnli", "bbh")}


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def model(stories: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories)


def rows(name: str, **options: Any) -> list[dict[str, Any]]:
    if name in ("alpaca", "code_alpaca"):
        options = {"data": f"{DATA[name]}/{name}.json", **options}
    return make_task(name, **{"data": DATA.get(name.partition("_")[0], ""), **options}).test()


# -------------------------------------------------------------------------------------------------------------- prompts


def test_alpaca_is_stanfords_template() -> None:
    fruit, numbers = rows("alpaca")[:2]
    assert fruit["prompt"] + fruit["completion"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a fruit.\n\n### Response:An apple."
    )
    assert numbers["prompt"] + numbers["completion"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the two numbers.\n\n### Input:\n3 and 4\n\n### Response:7"
    )
    assert rows("code_alpaca")[2]["prompt"].endswith("that lists files.\n\n### Response:")


def test_samsum_is_modulora_s_template() -> None:
    row = rows("samsum")[0]
    assert row["prompt"] + row["completion"] == (
        "### Summarize this: Amy: Who won the match?\r\nBen: We did, 3 to 1!\r\nAmy: Great, let's celebrate tonight.\n "
        "### Output: Their team won the match 3 to 1, and Amy wants to celebrate tonight."
    )


def test_mnli_is_modulora_s_template_with_words_or_digits(tmp_path: Path) -> None:
    record = {"premise": "It rains.", "hypothesis": "It is dry.", "label": "contradiction", "genre": "travel"}
    unknown = {**record, "label": 2, "genre": None}
    data = tmp_path / "dev_matched.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (record, unknown, {**record, "label": -1})))
    known, without_genre = rows("mnli", data=str(data))
    assert known["prompt"] == "### Premise: It rains.\n ### Hypothesis: It is dry.\n ### Genre: travel ### Label:"
    assert known["completion"] == " contradiction"
    assert without_genre["prompt"] == "### Premise: It rains.\n ### Hypothesis: It is dry.\n ### Label:"
    assert [row["completion"] for row in rows("mnli", data=str(data), digits=True)] == [" 2", " 2"]


def test_mnli_genre_asks_for_the_genre_of_each_premise_once(tmp_path: Path) -> None:
    pairs = [
        {"premise": " The bill passed . ", "hypothesis": "It failed.", "label": 2, "genre": "government"},
        {"premise": " The bill passed . ", "hypothesis": "It passed.", "label": 0, "genre": "government"},
        {"premise": "uh-huh", "hypothesis": "Yes.", "label": -1, "genre": "telephone"},
        {"premise": "Nobody knows.", "hypothesis": "Yes.", "label": 1, "genre": None},
    ]
    data = tmp_path / "a.json"
    data.write_text(json.dumps(pairs))
    bill, phone = rows("mnli_genre", data=str(data))
    assert bill["prompt"] == "### Text: The bill passed .\n ### Genre:"
    assert [bill["completion"], phone["completion"]] == [" government", " telephone"]
    assert [row["completion"] for row in rows("mnli_genre", data=str(data), digits=True)] == [" 1", " 3"]
    task = make_task("mnli_genre", data=str(data))
    assert task.score([" government", "telephone."], [bill, phone]) == {
        "accuracy": 1, "recall_government": 1, "recall_telephone": 1,
    }  # fmt: skip
    assert task.score([" slate", "telephone"], [bill, phone])["accuracy"] == 0.5
    data.write_text(json.dumps([{**pairs[0], "genre": "verse"}]))
    with pytest.raises(InputError, match="record 1: the genre is 'verse'"):
        rows("mnli_genre", data=str(data))


def test_mnli_is_stripped_and_a_label_that_is_none_is_named(tmp_path: Path) -> None:
    record = {"premise": " It rains. ", "hypothesis": "It is dry.\n", "label": 0, "genre": " travel"}
    data = tmp_path / "dev_matched.jsonl"
    data.write_text(json.dumps(record))
    (row,) = rows("mnli", data=str(data))
    assert row["prompt"] == "### Premise: It rains.\n ### Hypothesis: It is dry.\n ### Genre: travel ### Label:"
    for label in (5, "Entailment", None):
        data.write_text(json.dumps({**record, "label": label}))
        with pytest.raises(InputError, match=rf"record 1: the label is {label!r}; entailment, neutral, contradiction"):
            rows("mnli", data=str(data))


def test_a_null_dialogue_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('[{"dialogue": null, "summary": "Hi."}]')
    assert rows("samsum", data=str(tmp_path))[0]["prompt"] == "### Summarize this: \n ### Output:"


def test_chain_of_thought_prompts_are_the_authors_files_to_the_byte() -> None:
    task = make_task("bbh_cot", data=DATA["bbh"])
    first = {}
    for row in task.test():
        first.setdefault(row["task"], row)
    assert len(first) == 27
    for name, row in first.items():
        published = (ASSETS / "bbh" / "cot-prompts" / f"{name}.txt").read_bytes().split(b"-----\n", 1)[1]
        question = f"\n\nQ: {row['input']}\nA: Let's think step by step."
        assert row["prompt"].encode() == published + question.encode(), name
        assert len(row["shots"]) == 3


def test_direct_prompts_are_the_same_examples_with_the_answers_alone() -> None:
    task: Any = make_task("bbh_cot", data=DATA["bbh"])
    for row in rows("bbh_direct", only="snarks,dyck_languages"):
        reasoned = task.shots(row["task"], [])
        assert row["shots"] == [without_reasoning(shot) for shot in reasoned]
        assert [task.answer_in(shot) for shot in reasoned] == [shot.rpartition("\nA: ")[2] for shot in row["shots"]]
        assert row["prompt"].endswith(f"\n\nQ: {row['input']}\nA:")


def test_three_shot_prompts_are_instruct_evals() -> None:
    asked = rows("bbh", only="boolean_expressions")
    examples = [json.loads(line) for line in (ASSETS / "bbh" / "bbh.jsonl").read_text().splitlines()[:5]]
    given = "".join(f"{example['input']}\nAnswer: {example['target']}\n\n" for example in examples[:3])
    assert [row["prompt"] for row in asked] == [given + f"{example['input']}\nAnswer:" for example in examples[3:]]


def test_a_checkout_of_the_authors_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "bbh").mkdir()
    examples = [{"input": f"{n} is", "target": "True"} for n in range(4)]
    (tmp_path / "bbh" / "navigate.json").write_text(json.dumps({"canary": "", "examples": examples}))
    assert [row["task"] for row in rows("bbh", data=str(tmp_path))] == ["navigate"]
    with pytest.raises(InputError, match="did you mean 'navigate'"):
        rows("bbh", data=str(tmp_path), only="navigat")


def test_three_shot_examples_come_from_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    published: dict[str, list[dict[str, str]]] = {}
    for line in (ASSETS / "bbh" / "bbh.jsonl").read_text().splitlines():
        example = json.loads(line)
        published.setdefault(example.pop("task"), []).append(example)

    def load(path: str, *, name: str, split: str) -> list[dict[str, str]]:
        assert (path, split) == ("lukaemon/bbh", "test")
        return published[name]

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: list(published))
    monkeypatch.setattr(datasets, "load_dataset", load)
    some = {"only": "navigate,snarks"}
    assert rows("bbh", data="bbh") == rows("bbh", data="lukaemon/bbh") == rows("bbh")
    assert rows("bbh", data="bbh", **some) == rows("bbh", **some)
    with pytest.raises(InputError, match="prompts are not on the hub"):
        rows("bbh_cot", data="bbh")


def test_broken_files_of_bbh_are_said(tmp_path: Path) -> None:
    (tmp_path / "bbh").mkdir()
    for text, says in (
        ("{", "is not JSON"),
        ("{}", '"examples" is expected'),
        ('{"examples": [{}]}', "'input' is not"),
    ):
        (tmp_path / "bbh" / "navigate.json").write_text(text)
        with pytest.raises(InputError, match=rf"navigate\.json.*{says}"):
            rows("bbh", data=str(tmp_path))
    (tmp_path / "bbh.jsonl").write_text('{"input": "1 is", "target": "True"}')
    with pytest.raises(InputError, match=r"bbh\.jsonl:1: .*'task' is not there"):
        rows("bbh", data=str(tmp_path))
    with pytest.raises(InputError, match="there is no folder none"):
        rows("bbh", data="none")


def test_answers_have_the_room_that_they_need() -> None:
    tokens = {name: make_task(name, data=DATA["bbh"]).max_new_tokens for name in ("bbh", "bbh_direct", "bbh_cot")}
    assert tokens == {"bbh": 32, "bbh_direct": 128, "bbh_cot": 512}  # word_sorting has answers of 57


# --------------------------------------------------------------------------------------------------------------- splits


def test_counts_are_those_of_the_readme() -> None:
    task = make_task("mnli", data=DATA["mnli"])
    assert Counter(row["label"] for row in task.train()) == {"entailment": 16, "neutral": 16, "contradiction": 16}
    assert Counter(row["label"] for row in task.test()) == {"entailment": 12, "neutral": 8, "contradiction": 10}
    genres = {"telephone": 10, "slate": 8, "travel": 8, "government": 4}
    assert Counter(row["genre"] for row in task.test()) == genres
    assert len(rows("bbh_cot")) == 27 * 5
    assert len(rows("bbh")) == 27 * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [("samsum", {}), ("mnli", {"validation_data": 0.25}), ("alpaca", {"validation_data": 0.25})],
    ids=str,
)
def test_what_is_chosen_by_is_neither_trained_on_nor_reported(name: str, options: dict[str, Any]) -> None:
    task = make_task(name, data=DATA[name], **options)
    train, validation = ({row["prompt"] for row in split} for split in (task.train(), task.validation()))
    assert train
    assert validation
    assert not train & validation
    if name == "alpaca":
        with pytest.raises(InputError, match="no test split: name a file"):
            task.test()
    else:
        reported = {row["prompt"] for row in task.test()}
        assert reported
        assert not reported & (train | validation)


def test_packed_files_read_like_plain_ones(tmp_path: Path) -> None:
    plain = (ASSETS / "samsum" / "test.json").read_bytes()
    (tmp_path / "test.json.xz").write_bytes(lzma.compress(plain))
    (tmp_path / "other.json.gz").write_bytes(gzip.compress(plain))
    expected = rows("samsum")
    assert rows("samsum", data=str(tmp_path)) == expected
    assert rows("samsum", data=str(tmp_path / "other.json.gz")) == expected


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('[{"dialog": "A: Hi", "summary": "Hi."}]')
    with pytest.raises(InputError, match=r"record 1: no field 'dialogue'.*did you mean 'dialog'"):
        rows("samsum", data=str(tmp_path))
    with pytest.raises(InputError, match="holds no train"):
        make_task("samsum", data=str(tmp_path)).train()
    with pytest.raises(InputError, match="there is no file"):
        rows("samsum", data=str(tmp_path / "tset.json"))
    with pytest.raises(InputError, match="an array of JSON objects"):
        (tmp_path / "test.json").write_text('[{"a": 1}, 2]')
        rows("samsum", data=str(tmp_path))
    with pytest.raises(InputError, match=r"give a \.json or \.jsonl file"):  # the name is looked for on the hub
        rows("samsum", data="samsum")


# ---------------------------------------------------------------------------------------------------------- what is cut


def test_a_long_chat_loses_its_end_but_not_the_separator(tokenizer: Any) -> None:
    task = make_task("samsum", data=DATA["samsum"], source_tokens=40)
    for row in task.train():
        short = task.fitted(row, tokenizer)
        assert len(tokenizer(short["prompt"], add_special_tokens=False)["input_ids"]) <= 40
        assert short["prompt"].endswith("\n ### Output:")
        assert short["completion"] == row["completion"]
        chat = short["prompt"].removeprefix("### Summarize this: ").removesuffix("\n ### Output:")
        assert row["dialogue"].startswith(chat)
        longer = row["dialogue"][: len(chat) + 4]
        whole = task.template.fill({**row, "dialogue": longer})["prompt"]  # type: ignore[union-attr]
        assert len(tokenizer(whole, add_special_tokens=False)["input_ids"]) > 40 or longer == row["dialogue"]


def test_an_input_cut_to_nothing_keeps_its_template(tokenizer: Any) -> None:
    row = rows("alpaca")[1]
    task = make_task("alpaca", data=f"{DATA['alpaca']}/alpaca.json")
    prompt = row["prompt"].replace("3 and 4", "")
    short = task.fitted(row, tokenizer, len(tokenizer(prompt)["input_ids"]))
    assert short["prompt"] == prompt
    assert "\n\n### Input:\n\n\n### Response:" in prompt


def test_of_a_pair_the_premise_is_cut_before_the_hypothesis(tokenizer: Any) -> None:
    row = next(row for row in rows("mnli") if len(row["premise"]) > 50)
    task = make_task("mnli", data=DATA["mnli"], source_tokens=90)
    short = task.fitted(row, tokenizer)
    assert short["hypothesis"] == row["hypothesis"]
    assert row["premise"].startswith(short["premise"])
    assert len(short["premise"]) < len(row["premise"])
    assert short["prompt"].endswith(" ### Label:")
    with pytest.raises(InputError, match="even without its premise and hypothesis"):
        make_task("mnli", data=DATA["mnli"], source_tokens=10).fitted(row, tokenizer)


def test_a_model_with_little_room_is_given_fewer_examples(tokenizer: Any) -> None:
    task = make_task("bbh", data=DATA["bbh"], only="boolean_expressions")
    row = task.test()[0]
    whole = len(tokenizer(row["prompt"])["input_ids"])
    short = task.fitted(row, tokenizer, whole - 1)
    assert len(short["shots"]) == 2
    assert short["prompt"].endswith(row["prompt"][-40:])
    with pytest.raises(InputError, match="a question alone"):
        task.fitted(row, tokenizer, 5)


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["alpaca", "code_alpaca", "samsum", "mnli", "bbh", "bbh_direct", "bbh_cot"])
def test_a_perfect_answer_scores_1(name: str) -> None:
    pytest.importorskip("rouge_score")
    options = {"data": f"{DATA[name]}/{name}.json"} if "alpaca" in name else {"data": DATA[name.partition("_")[0]]}
    task = make_task(name, **options)
    evaluated = task.test()
    perfect = [row["completion"] for row in evaluated]
    if name == "bbh_cot":
        perfect = [f"\nWe think. So the answer is{answer}." for answer in perfect]
    scores = task.score(perfect, evaluated)
    main = next(iter(scores))
    assert scores[main] == 1
    if name.startswith("bbh"):
        assert set(scores.values()) == {1}
        assert len(scores) == 27 + 3


def test_a_constant_answer_scores_what_it_should() -> None:
    task, evaluated = make_task("mnli", data=DATA["mnli"]), rows("mnli")
    scores = task.score([" Neutral."] * 30, evaluated)
    assert scores["accuracy"] == pytest.approx(8 / 30)
    assert (scores["recall_neutral"], scores["recall_entailment"], scores["recall_contradiction"]) == (1, 0, 0)

    bbh = make_task("bbh", data=DATA["bbh"], only="boolean_expressions,navigate")
    asked = bbh.test()
    share = {
        name: sum(row["target"] == "True" for row in asked if row["task"] == name) / 2
        for name in ("boolean_expressions", "navigate")
    }
    scores = bbh.score([" True and so on\nTrue"] * 4, asked)
    assert scores["exact_match"] == 0
    assert scores["prefix_match"] == pytest.approx(sum(share.values()) / 2)
    scores = bbh.score([" True\n\nand so on"] * 4, asked)
    assert scores["exact_match/boolean_expressions"] == share["boolean_expressions"]
    assert scores["exact_match/navigate"] == 0
    assert scores["exact_match"] == pytest.approx(sum(share.values()) / 2)


def test_rouge_is_rouge_score_with_stemming() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    task, evaluated = make_task("samsum", data=DATA["samsum"]), rows("samsum")
    outputs = ["Their teams wins the match", "Dee waters plants.\nCal did it.", ""]
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    each = [scorer.score(row["summary"], output) for row, output in zip(evaluated, outputs, strict=True)]
    scores = task.score(outputs, evaluated)
    assert scores == {name: sum(one[name].fmeasure for one in each) / 3 for name in names}
    assert rouge(["The teams matched"], ["the team matches"])["rouge1"] == 1  # stems, not words
    assert task.score([""] * 3, evaluated)["rougeLsum"] == 0


def test_rouge_of_a_hundred_pairs_is_the_mean_of_rouge_score_s() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    draw = Random(0)
    words = " ".join(row["dialogue"] + " " + row["summary"] for row in rows("samsum")).split()

    def text(longest: int) -> str:
        return "\n".join(" ".join(draw.choices(words, k=draw.randint(0, longest))) for _ in range(draw.randint(1, 3)))

    references = [text(20) for _ in range(100)]
    outputs = [f"{reference[: draw.randint(0, 60)]} {text(8)}" for reference in references]
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    each = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    scores = rouge(outputs, references)
    assert set(scores) == set(names)
    for name in names:
        assert scores[name] == pytest.approx(sum(one[name].fmeasure for one in each) / 100, abs=1e-12)
        assert 0.1 < scores[name] < 0.9
    assert scores["rougeL"] != scores["rougeLsum"]


# --------------------------------------------------------------------------------------------------- evaluating a model


def test_batches_give_the_answers_of_single_prompts(model: Any, tokenizer: Any) -> None:
    prompts = ["Once upon a time", "The dog", "Lily went to the park with her mom and", "Tom"]
    single = complete(model, tokenizer, prompts, max_new_tokens=10)
    steps: list[tuple[int, int]] = []
    batched = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=10,
        batch_size=3,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert batched == single
    assert steps == [(3, 4), (4, 4)]
    cut = complete(model, tokenizer, prompts, max_new_tokens=10, batch_size=4, stop=(",", " the"))
    assert cut == [min((text.partition(stop)[0] for stop in (",", " the")), key=len) for text in single]


def test_the_likeliest_choice_has_the_largest_sum_of_log_probabilities(model: Any, tokenizer: Any) -> None:
    prompts, choices = ["Once upon a", "The cat and the", "She was very"], [" time", " dog", " happy"]
    expected = []
    for prompt in prompts:
        sums = []
        for choice in choices:
            begin = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor(tokenizer(prompt + choice)["input_ids"])[None]
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(begin, ids.shape[1])))
        expected.append(sums.index(max(sums)))
    assert expected == [0, 1, 2]
    assert choose(model, tokenizer, prompts, choices) == expected
    assert choose(model, tokenizer, prompts, choices, batch_size=2) == expected
    logits: list[torch.Size] = []
    hook = model.register_forward_hook(lambda _, __, output: logits.append(output.logits.shape))
    longer = " ".join(prompts)
    choose(model, tokenizer, [longer], choices)
    hook.remove()
    prompt, *whole = (len(tokenizer(longer + choice)["input_ids"]) for choice in ("", *choices))
    (shape,) = logits  # of the choices alone, not of the prompt
    assert shape[:2] == (len(choices), 1 + max(whole) - prompt)


def test_mnli_is_scored_by_likelihood_and_by_generation(model: Any, tokenizer: Any) -> None:
    task = make_task("mnli", data=DATA["mnli"], source_tokens=400)
    steps: list[int] = []
    result = task.evaluate(model, tokenizer, limit=5, batch_size=3, on_step=lambda done, total: steps.append(done))
    assert next(iter(result)) == "accuracy"
    assert {"accuracy_generated", "recall_neutral", "recall_neutral_generated"} <= set(result)
    assert result["examples"] == 5
    assert steps == [3, 5, 8, 10]


def test_a_limit_takes_examples_from_all_over_the_data(model: Any, tokenizer: Any) -> None:
    task = make_task("bbh", data=DATA["bbh"], only="boolean_expressions,navigate,object_counting", max_new_tokens=2)
    result = task.evaluate(model, tokenizer, limit=3, batch_size=3)
    assert {key for key in result if "/" in key} == {
        "exact_match/boolean_expressions",
        "exact_match/navigate",
        "exact_match/object_counting",
    }
    assert result["shortened_prompts"] > 0  # 512 positions
    with pytest.raises(InputError, match="at least one"):
        task.evaluate(model, tokenizer, limit=0)


def test_perplexity_tasks_follow_their_protocols(model: Any, tokenizer: Any, wikitext2: Path, tmp_path: Path) -> None:
    lines = (wikitext2 / "test.txt").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    (tmp_path / "wiki.test.raw").write_text("".join(lines), encoding="utf-8")
    wiki: Any = make_task("wikitext2", data=str(tmp_path / "wiki.test.raw"))
    joined = "\n\n".join(line if line.strip() else "" for line in lines)
    assert wiki.ids(tokenizer, 64).tolist() == [tokenizer(joined)["input_ids"]]

    c4: Any = make_task("c4", data=str(ASSETS / "c4" / "c4.jsonl"))
    texts = [json.loads(line)["text"] for line in (ASSETS / "c4" / "c4.jsonl").read_text().splitlines()]
    assert c4.ids(tokenizer, 2).tolist() == [tokenizer(" ".join(texts), verbose=False)["input_ids"][:512]]
    result = make_task("c4", data=str(ASSETS / "c4" / "c4.jsonl"), context=64).evaluate(model, tokenizer, limit=3)
    assert (result["tokens"], result["context"]) == (192, 64)


def test_chats_have_one_start_token(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from llmtools.data.generation import _ids

    pytest.importorskip("rouge_score")
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    task = make_task(
        "chat", data=str(tmp_path / "a.jsonl"), validation_data=str(tmp_path / "a.jsonl"), max_new_tokens=4
    )
    text = str(chatty.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
    assert _ids(chatty, text).count(chatty.bos_token_id) == 1
    assert task.evaluate(model, chatty)["examples"] == 1
    assert task.score(["Hello there"], task.validation())["rougeL"] == 1
    refused = {"messages": [{"role": "user", "content": "Hi"}, chat[1]]}
    chatty.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(InputError, match=r"row 7: .*roles user: no such role"):
        prompt_text(refused, chatty, where="row 7")
    (tmp_path / "b.jsonl").write_text('{"text": "Hi"}\n')
    with pytest.raises(InputError, match=r'rows of "messages"'):
        make_task("chat", data=str(tmp_path / "b.jsonl")).train()


def test_a_chat_is_asked_in_the_tokens_it_was_trained_in(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the template writes no start token; and a last turn of the user's is no answer."""
    from transformers import AutoTokenizer

    pytest.importorskip("rouge_score")
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    row = {"messages": [*chat, {"role": "user", "content": "Thanks"}]}
    assert answer(row) == "Hello there"
    assert prompt_text(row, chatty) == "user: Hi\n"
    with pytest.raises(InputError, match=r"row 1: .*no answer to evaluate"):
        prompt_text({"messages": chat[:1]}, chatty, where="row 1")

    data = str(tmp_path / "a.jsonl")
    Path(data).write_text(json.dumps(row) + "\n")
    asked: list[Any] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: asked.append(kw["input_ids"].tolist()) or generate(**kw))
    make_task("chat", data=data, validation_data=data, max_new_tokens=2).evaluate(model, chatty)
    trained = chatty.apply_chat_template(chat[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert asked == [[trained["input_ids"]]]
