"""The published quickstart runs, on a small local model and a few lines of data in Alpaca's schema.

`QUICKSTART` is the published code, section by section, with what could not run mended: names of today's transformers
(``eval_strategy``), a device that may be the CPU, the layers' own names (``q_proj`` … for the fused ``qkv_proj``), and
sizes that fit a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.errors import InputError
from tests.hub import Hub

QUICKSTART = """
import torch
from transformers import AutoTokenizer
from llmtools.llms.autollm import AutoLLMForCausalLM

# load quip model and tokenizer
llm, quip_config = AutoLLMForCausalLM.from_pretrained(model_name, load_in_quip=True, device_map="auto")
llm.eval()
tokenizer = AutoTokenizer.from_pretrained(model_name, device_map="auto", use_fast=False)
tokenizer.pad_token = tokenizer.eos_token

# encode prompt
prompt = 'The pyramids were built by'
input_ids = tokenizer.encode(prompt, return_tensors="pt").to(llm.device)

# generate text
with torch.no_grad():
    generated_ids = llm.generate(
        inputs=input_ids,
        do_sample=True,
        max_new_tokens=8,
    )

# decode and print
output = tokenizer.decode([el.item() for el in generated_ids[0]])
print(output)

# set up finetuning config
from llmtools.engine.lora.config import FinetuneConfig
tune_config = FinetuneConfig(
    dataset=dataset,
    data_type = 'alpaca',
    lora_out_dir='./llama-65b-quantized-lora',
    mbatch_size=1,
    batch_size=2,
    epochs=1,
    lr=2e-4,
    cutoff_len=256,
    lora_r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    val_set_size=0.2,
    warmup_steps=1,
    save_steps=50,
    save_total_limit=3,
    logging_steps=1,
)

# set up lora
from llmtools.engine.lora.peft import quant_peft
lora_config = quant_peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=tune_config.lora_r,
    lora_alpha=tune_config.lora_alpha,
    lora_dropout=tune_config.lora_dropout,
    bias="none",
    target_modules=["q_proj", "k_proj", "v_proj"],
)

# create a new lora from config
model = quant_peft.get_peft_model(llm, lora_config)

# load stanford alpaca data
from llmtools.data import TrainSAD
data = TrainSAD(
    tune_config.dataset,
    tune_config.val_set_size,
    tokenizer,
    tune_config.cutoff_len
)
data.prepare_data() # this tokenizes the dataset

# training args
import transformers
training_arguments = transformers.TrainingArguments(
    per_device_train_batch_size=tune_config.mbatch_size,
    gradient_accumulation_steps=tune_config.gradient_accumulation_steps,
    warmup_steps=tune_config.warmup_steps,
    num_train_epochs=tune_config.epochs,
    learning_rate=tune_config.lr,
    fp16=torch.cuda.is_available(),
    logging_steps=tune_config.logging_steps,
    eval_strategy="no",
    save_strategy="steps",
    eval_steps=None,
    save_steps=tune_config.save_steps,
    output_dir=tune_config.lora_out_dir,
    save_total_limit=tune_config.save_total_limit,
    load_best_model_at_end=False,
    ddp_find_unused_parameters=False if tune_config.ddp else None,
)

# start trainer
from llmtools.engine.hf.trainer import Trainer
trainer = Trainer(
    model=model,
    train_dataset=data.train_data,
    eval_dataset=data.val_data,
    args=training_arguments,
    data_collator=transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm=False
    ),
)

# start training
trainer.train()

# Save Model
model.save_pretrained(tune_config.lora_out_dir)
"""

INFERENCE = """
llm, quip_config = AutoLLMForCausalLM.from_pretrained(model_name, load_in_quip=True, device_map="auto")
model = quant_peft.PeftModel.from_pretrained(llm, tune_config.lora_out_dir, device_map='auto')
"""

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Tell a story.", "input": "a dog and a ball", "output": "The dog lost the ball."},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Name the animal.", "input": "It says moo.", "output": "A cow."},
    {"instruction": "Count to three.", "input": "", "output": "One, two, three."},
]

SETTINGS: dict[str, Any] = {
    "dataset": None,
    "ds_type": "alpaca",
    "lora_out_dir": "out",
    "mbatch_size": 2,
    "batch_size": 16,
    "epochs": 3,
    "lr": 1e-3,
    "cutoff_len": 256,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "val_set_size": 0.2,
    "warmup_steps": 0,
    "save_steps": 10,
    "save_total_limit": 3,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def quip(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in 4 bits of QuIP#."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = llmtools.calibration(["Once upon a time there was a dog. " * 40], tokenizer, samples=2, tokens=64)
    llmtools.quantize(model, "quip_sharp", text, bits=4)
    return llmtools.save(model, tokenizer, tmp_path_factory.mktemp("porch") / "stories-quip")


@pytest.fixture(scope="module")
def optq(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in 4 bits, rounded to nearest on the grid that OPTQ uses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    folder = tmp_path_factory.mktemp("porch") / "stories-4bit"
    return llmtools.save(model, AutoTokenizer.from_pretrained(stories), folder)


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def test_the_published_quickstart_runs(
    quip: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    names: dict[str, Any] = {"model_name": str(quip), "dataset": str(alpaca)}
    exec(QUICKSTART, names)
    assert "The pyramids were built by" in capsys.readouterr().out
    assert names["quip_config"].quantizers[0]["name"] == "quip_sharp"
    assert names["trainer"].state.global_step == 2  # four examples in batches of two
    assert (len(names["data"].train_data), len(names["data"].val_data)) == (4, 1)
    assert (tmp_path / "llama-65b-quantized-lora" / "adapter_model.safetensors").exists()
    before = names["model"]
    exec(INFERENCE, names)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(ids).logits, before.eval()(ids).logits)


def test_the_checkpoint_decides_and_a_wrong_flag_says_so(quip: Path, optq: Path, stories: Path) -> None:
    from llmtools.llms.autollm import AutoLLMForCausalLM as Auto

    llm, config = Auto.from_pretrained(str(optq), load_in_gbtq=True, trust_remote_code=False)
    assert config.quantizers[0]["bits"] == 4
    assert not llm.training
    assert Auto.from_pretrained(str(stories))[1] is None
    for name, flags, says in (
        (optq, {"load_in_quip": True}, "load_in_quip=True, and .* is quantized with rtn; leave the flag out"),
        (quip, {"load_in_quip": False}, "is quantized with quip_sharp"),
        (quip, {"load_in_gbtq": True}, "is quantized with quip_sharp"),
        (stories, {"load_in_quip": True}, "is not quantized"),
        (quip, {"load_in_quip": True, "load_in_gbtq": True}, "exclude each other"),
    ):
        with pytest.raises(InputError, match=says):
            Auto.from_pretrained(str(name), **flags)
    with pytest.raises(InputError, match="from_pretrained"):
        Auto()


def test_the_published_checkpoints_open_without_a_tokenizer_beside_them(tmp_path: Path) -> None:
    from llmtools.llms.autollm import AutoLLMForCausalLM as Auto
    from tests.formats.test_quip_sharp import write

    write(tmp_path / "E8P-2Bit", 2)
    llm, config = Auto.from_pretrained(str(tmp_path / "E8P-2Bit"), load_in_quip=True, device_map="auto")
    assert {spec["name"] for spec in config.quantizers} <= {"quip_sharp", "quip_sharp_rows"}
    assert llm.generate(torch.arange(3, 8)[None], max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_the_model_saves_and_uploads_with_its_card(optq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtools.llms.autollm import AutoLLMForCausalLM as Auto

    hub = Hub(monkeypatch)
    llm, _ = Auto.from_pretrained(str(optq))
    llm.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "llmtools"
    )
    assert llm.push_to_hub("me/stories-4bit", private=True) == "https://huggingface.co/me/stories-4bit"
    assert hub.repos["me/stories-4bit"]["private"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files)
    assert b"import llmtools" in hub.files["README.md"]


def test_quant_peft_is_stock_peft_and_is_imported_when_asked_for() -> None:
    import peft

    from llmtools.engine.lora.peft import quant_peft

    assert quant_peft is peft
    code = (
        "import sys, llmtools.engine.lora.peft as porch; assert 'peft' not in sys.modules; porch.quant_peft.LoraConfig"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import llmtools.engine.lora.peft as porch

    with pytest.raises(AttributeError, match="nothing"):
        _ = porch.nothing


def test_the_sixteen_settings_and_what_follows_from_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llmtools.engine.lora.config import FinetuneConfig

    config = FinetuneConfig(**SETTINGS)
    assert len(SETTINGS) == 16
    assert {key: getattr(config, key) for key in SETTINGS} == SETTINGS
    assert (config.data_type, config.gradient_accumulation_steps, config.ddp, config.device_map) == (
        "alpaca", 8, False, "auto",
    )  # fmt: skip
    settings = {key: value for key, value in SETTINGS.items() if key != "ds_type"}
    assert FinetuneConfig(**settings, data_type="samsum").ds_type == "samsum"
    assert FinetuneConfig(**{**SETTINGS, "val_set_size": 200.0}).val_set_size == 200
    assert "batch_size=16" in repr(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = FinetuneConfig(**SETTINGS)
    assert (config.gradient_accumulation_steps, config.ddp, config.device_map) == (2, True, {"": 1})
    with pytest.raises(InputError, match="batch_size=4 is smaller than one step: mbatch_size=2 on 4"):
        FinetuneConfig(**{**SETTINGS, "batch_size": 4})
    FinetuneConfig(**{**SETTINGS, "batch_size": 20})
    assert "batches have 16" in caplog.text
    with pytest.raises(InputError, match="are synonyms"):
        FinetuneConfig(**SETTINGS, data_type="samsum")
    with pytest.raises(TypeError, match="epohcs"):
        FinetuneConfig(**SETTINGS, epohcs=3)


def test_the_alpaca_helper_splits_tokenizes_and_cuts_no_answer(
    stories: Path, alpaca: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    from llmtools.data import TrainSAD

    tokenizer = AutoTokenizer.from_pretrained(stories)
    data = TrainSAD(str(alpaca), 2, tokenizer, 512)
    data.prepare_data()
    assert (len(data.train_data), len(data.val_data)) == (3, 2)
    texts = [tokenizer.decode(row["input_ids"]) for part in (data.train_data, data.val_data) for row in part]
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in data.train_data)
    for row in ROWS:
        (text,) = [text for text in texts if row["output"] in text]
        assert row["instruction"] in text
        assert ("### Input:" in text) == bool(row["input"])
    again = TrainSAD(str(alpaca), 2, tokenizer, 512)
    again.prepare_data(use_eos_token=False)
    assert again.train_data[0]["input_ids"] == data.train_data[0]["input_ids"][:-1]

    lengths = sorted(len(row["input_ids"]) for part in (data.train_data, data.val_data) for row in part)
    short = TrainSAD(str(alpaca), 0, tokenizer, lengths[1])
    short.prepare_data()
    assert (len(short.train_data), short.val_data) == (2, None)
    assert f"3 of 5 examples are longer than cutoff_len={lengths[1]}" in caplog.text
    with pytest.raises(InputError, match=f"the shortest has {lengths[0]}"):
        TrainSAD(str(alpaca), 0, tokenizer, 10).prepare_data()
    with pytest.raises(InputError, match="val_set_size=5 of 5 rows"):
        TrainSAD(str(alpaca), 5, tokenizer, 512).prepare_data()
    with pytest.raises(InputError, match=r"nowhere\.json"):
        TrainSAD("nowhere.json", 0, tokenizer, 512).prepare_data()
