"""The plan's figures are those of a real step: bytes of tensors exactly, peaks within a tenth or so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_growth
from llmtools.cli.app import main
from llmtools.errors import InputError
from llmtools.model import memory
from llmtools.nn.loss import chunked_loss
from llmtools.recipes.estimate import KERNEL_BYTES, LAYER_BYTES, Plan, plan, plan_for, size
from llmtools.recipes.finetune import Lora
from tests.models import CONFIGS, llama_config, tiny_mixture, tiny_model

peft = pytest.importorskip("peft")

FIVE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4}


def held(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def recipe(**changes: Any) -> Plan:
    return Plan(
        **{"model": "here", "quantizer": "rtn", "max_length": 32, "device": "cpu", "dtype": "float32"} | changes
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("name, options", [("rtn", {"bits": 3, "clip": False}), ("nf4", {})])
def test_what_stays_is_known_to_the_byte(family: str, name: str, options: dict[str, Any]) -> None:
    """Grouped keys; tied embeddings; biases."""
    from llmtools import quantize
    from llmtools.nn.swap import packed_bytes

    model = tiny_model(family)
    dense = held(model)
    quantize(model, name, None, **options)
    planned = plan_for(CONFIGS[family](), recipe(quantizer=name, options=options))
    ours, its = planned.memory, planned.lora_16_bit
    assert ours.packed == packed_bytes(model)
    assert ours.packed + ours.linears + ours.embeddings + ours.others == held(model)
    assert its.packed + its.linears + its.embeddings + its.others == dense
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert planned.trainable == trainable
    assert (ours.adapters, ours.gradients, ours.optimizer) == (4 * trainable, 4 * trainable, 8 * trainable)


def measured(checkpointing: bool, chunked: bool, dropout: float) -> int:
    """Bytes that a real step allocates at its peak, by the allocator's own record."""
    from transformers import AutoModelForCausalLM

    from llmtools import prepare_for_training, quantize

    model: Any = AutoModelForCausalLM.from_config(llama_config(**FIVE))
    quantize(model, "rtn", None, clip=False)
    prepare_for_training(model, gradient_checkpointing=checkpointing)
    config = peft.LoraConfig(r=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    base = model.get_base_model()
    ids = torch.randint(3, 512, (2, 96))

    def step() -> None:
        if chunked:
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = chunked_loss(hidden, base.lm_head, ids).sum / ids.numel()
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    return peak_growth(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing, chunked, dropout", [(False, True, 0.05), (True, True, 0.0), (False, False, 0.0)]
)
def test_the_peak_is_that_of_a_real_step(checkpointing: bool, chunked: bool, dropout: float) -> None:
    planned = plan_for(
        llama_config(**FIVE),
        recipe(
            batch_size=2,
            max_length=96,
            gradient_checkpointing=checkpointing,
            chunked_loss=chunked,
            lora=Lora(r=8, dropout=dropout),
        ),
    ).memory
    moving, real = planned.activations + planned.loss + planned.work, measured(checkpointing, chunked, dropout)
    # gradients of adapters grow while activations shrink, so the peak lies between: none of them, and all
    assert 0.9 * moving <= real <= 1.1 * (moving + planned.gradients)


def test_two_short_runs_tell_of_the_whole_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpointing in (False, True):
        made = recipe(gradient_checkpointing=checkpointing)
        short = plan_for(llama_config(**FIVE), made).memory
        with monkeypatch.context() as patched:
            patched.setattr(memory, "_DEPTHS", (4, 5))
            assert plan_for(llama_config(**FIVE), made).memory == short


@pytest.mark.parametrize("family", ["gemma3", "bloom"])
def test_families_with_attention_or_layers_of_their_own(family: str) -> None:
    planned = plan_for(CONFIGS[family](), recipe())
    assert planned.memory.packed < planned.lora_16_bit.linears
    assert planned.memory.activations > 0


@pytest.mark.parametrize(("dtype", "modules"), [("float32", "experts"), ("bfloat16", "all-linear")])
def test_a_mixture_is_planned_with_the_same_adapters_packed_and_dense(dtype: str, modules: str) -> None:
    given = recipe(dtype=dtype, lora=Lora(r=4, target_modules=modules))
    found = plan_for(tiny_mixture("qwen2_moe").config, given)
    assert found.memory.adapters == found.lora_16_bit.adapters > 0
    assert found.memory.linears == 0 < found.memory.packed < found.lora_16_bit.linears


def test_planning_leaves_nothing_behind_in_caches_of_tables(repository: Path) -> None:
    """Tables are made once in a process; one that was first asked for while planning must not be without values."""
    program = """
import torch
import llmtools
from llmtools.recipes.estimate import Plan, plan_for
from tests.models import llama_config
for name in ("nf4", "quip_sharp", "quip", "optq"):
    for device in ("cpu", "cuda"):
        plan_for(llama_config(), Plan("here", quantizer=name, max_length=8, device=device))
    quantizer = llmtools.quantizer(name)
    packed = quantizer.quantize(torch.randn(16, 64), torch.eye(64))
    for x in (torch.randn(3, 64), torch.randn(200, 64, requires_grad=True)):
        assert type(quantizer.linear(x, packed).detach()) is torch.Tensor
    assert quantizer.dequantize(packed).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=repository)
    assert done.returncode == 0, done.stderr


def test_checkpointing_and_a_gpu_change_what_moves() -> None:
    config = llama_config(**FIVE)
    plain, checkpointed = (plan_for(config, recipe(batch_size=4, gradient_checkpointing=on)) for on in (False, True))
    assert checkpointed.total < plain.total
    gpu = plan_for(config, recipe(device="cuda", dtype="bfloat16"))
    assert "with checkpointing, on a GPU" in gpu.step
    assert gpu.memory.adapters == plain.memory.adapters  # float32 under autocast


def test_a_checkpoint_is_planned_as_it_was_made(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtools.recipes.quantize import Quantize, quantize

    made = quantize(
        Quantize(
            str(stories),
            str(tmp_path / "q"),
            quantizer="rtn",
            bits=2,
            group_size=32,
            overrides={"down_proj": {"bits": 4}},
        )
    )
    planned = plan(Plan(str(tmp_path / "q"), max_length=16))
    assert (planned.memory.packed, planned.modules) == (made.packed_bytes, made.modules)
    assert planned.bits_per_weight == pytest.approx(made.bits_per_weight)

    capsys.readouterr()
    words = ["plan", "--model", str(stories / "config.json"), "--quantizer", "rtn", "--bits", "2", "--group_size", "32"]
    assert main([*words, "--max_length", "16", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["packed"] < made.packed_bytes
    assert told["total"] == sum(told["memory"].values())
    assert told["fits"] is True and told["remedies"] == []


def test_weights_in_files_need_no_memory() -> None:
    def planned(**changes: Any) -> Any:
        return plan_for(llama_config(), recipe(device="cpu", gradient_checkpointing=True, **changes))

    held, streamed = planned(), planned(offload="disk")
    assert streamed.memory == held.memory and held.in_files == 0
    memory = held.memory
    assert streamed.in_files == memory.packed + memory.linears + memory.embeddings + memory.others
    rest, near = (held.total - streamed.in_files) / 1e9, 1e-5
    assert planned(memory=rest + near, offload="disk").fits is True
    assert planned(memory=rest - near, offload="disk").fits is False
    assert planned(memory=rest + near).remedies[0].startswith("--offload disk: ")
    with pytest.raises(InputError, match="--device cpu"):
        plan_for(llama_config(), recipe(device="cuda", offload="disk"))
    with pytest.raises(InputError, match="did you mean 'disk'"):
        plan_for(llama_config(), recipe(device="cpu", offload="disc"))


def test_the_objects_of_layers_are_memory_on_a_cpu() -> None:
    for config, kernels in ((llama_config(), 0), (tiny_mixture("qwen2_moe").config, KERNEL_BYTES)):
        found = plan_for(config, recipe(device="cpu"))
        assert found.memory.objects == LAYER_BYTES * found.modules + kernels
        assert found.lora_16_bit.objects == 0
        assert plan_for(config, recipe(device="cuda")).memory.objects == 0


def test_weights_in_host_memory_take_two_buffers_of_the_device() -> None:
    def planned(**changes: Any) -> Any:
        return plan_for(
            llama_config(num_hidden_layers=4), recipe(device="cuda", gradient_checkpointing=True, **changes)
        )

    held, moved = planned(), planned(offload="cpu")
    assert moved.memory == held.memory and held.on_host == held.buffers == 0
    assert moved.on_host == held.memory.packed and moved.buffers == held.memory.packed // 2
    rest, near = (held.total - moved.buffers) / 1e9, 1e-5
    assert planned(memory=rest + near, offload="cpu").fits is True
    assert planned(memory=rest - near, offload="cpu").fits is False
    assert planned(memory=rest + near).remedies[0].startswith("--offload cpu: ")
    assert f"of it in host memory, copied as it is needed: {size(moved.on_host)}" in str(moved)
    with pytest.raises(InputError, match="--device cuda"):
        plan_for(llama_config(), recipe(device="cpu", offload="cpu"))


def test_where_it_does_not_fit_remedies_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(batch_size=4, gradient_checkpointing=False, dtype="bfloat16")
    ample = plan_for(llama_config(**FIVE), made)
    tight = plan_for(llama_config(**FIVE), Plan(**vars(made) | {"memory": ample.total / 2e9}))
    assert ample.fits and not tight.fits
    assert tight.remedies[0].startswith("--gradient_checkpointing true: ")
    assert "it does not fit" in str(tight)
    hopeless = plan_for(llama_config(**FIVE), Plan(**vars(made) | {"memory": 1e-6}))
    assert hopeless.remedies[-1] == "a smaller model, more memory, or several devices"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"batch_size": 0}, "batch_size=0; at least 1"),
        ({"max_length": 500}, "128 positions"),
        ({"optim": "adamw"}, "did you mean 'adamw_torch'"),
        ({"device": "gpu"}, "cpu, cuda"),
        ({"dtype": "half"}, "bfloat16"),
        ({"quantizer": "opqt"}, "did you mean 'optq'"),
        ({"lora": Lora(target_modules=["nothing"])}, "nothing"),
    ],
)
def test_mistakes_name_the_value_and_the_way_out(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan_for(llama_config(), recipe(**changes))


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "config.json"
    for text in ("no", "{}", '{"model_type": "nothing"}', "[]"):
        bad.write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            plan(Plan(str(bad)))
    with pytest.raises(InputError, match="there is no folder"):
        plan(Plan("./nowhere"))


@pytest.mark.slow
def test_validation_is_that_of_a_real_forward() -> None:
    from transformers import AutoModelForCausalLM

    from llmtools import prepare_for_training, quantize

    config = llama_config(**FIVE)
    made = recipe(batch_size=1, max_length=96, eval_batch_size=4, gradient_checkpointing=False)
    planned = plan_for(config, made)
    model: Any = AutoModelForCausalLM.from_config(config)
    quantize(model, "rtn", None, clip=False)
    prepare_for_training(model, gradient_checkpointing=False)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).eval()
    base, ids = model.get_base_model(), torch.randint(3, 512, (4, 96))

    @torch.no_grad()
    def validate() -> None:
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        chunked_loss(hidden, base.lm_head, ids)

    validate()
    kept = held(base) + planned.memory.optimizer  # adapters are in the model
    kept += planned.memory.program + planned.memory.heap + planned.memory.objects
    assert planned.validation is not None
    assert planned.validation - kept == pytest.approx(peak_growth(validate), rel=0.1)
    assert "validation, batches of 4" in str(planned)


def test_a_batch_of_validation_may_be_what_does_not_fit() -> None:
    config = llama_config(**FIVE)
    alone = plan_for(config, recipe())
    assert alone.validation is None and "validation" not in str(alone)
    same, large = (plan_for(config, recipe(eval_batch_size=batch)) for batch in (1, 64))
    assert same.validation < same.total < large.validation  # type: ignore[operator]
    assert same.memory == large.memory == alone.memory
    between = (large.total + large.validation) / 2e9  # type: ignore[operator]
    narrow = plan_for(config, recipe(eval_batch_size=64, memory=between))
    assert narrow.fits is False and narrow.remedies[0].startswith("--eval_batch_size 1: ")
    assert narrow.remedies[0].endswith("fits")
    with pytest.raises(InputError, match="eval_batch_size=0"):
        plan_for(config, recipe(eval_batch_size=0))


def test_the_loss_is_planned_without_all_logits() -> None:
    words, length = 2**19, 128
    config = llama_config(**FIVE, vocab_size=words)
    chunked, whole = (plan_for(config, recipe(max_length=length, chunked_loss=chunked)) for chunked in (True, False))
    logits = 4 * words * length
    assert chunked.memory.loss < logits / 2 < logits <= whole.memory.loss + whole.memory.work
