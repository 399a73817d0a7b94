"""``finetune --merge zeros`` and `merge`: a plain LoRA that goes into zero points or minima, and changes no code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("trl")

import peft

import llmtools
from llmtools.checkpoint.folder import load_model
from llmtools.errors import InputError
from llmtools.model.adapter_files import merged_as
from llmtools.model.zeros_lora import keep_pooled, zeros_layers
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.nn.adapters import merge as merge_dense
from llmtools.nn.adapters import merge_into_packed
from llmtools.quant import quantizer
from llmtools.recipes.finetune import Finetune, Lora, finetune
from llmtools.recipes.merge import Merge, merge
from llmtools.recipes.quantize import Quantize, quantize
from tests.formats import test_hqq
from tests.formats.writers import write
from tests.models import tiny_model
from tests.recipes.test_exact import data, logits  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 2e-2}
SIZE = 32


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "q"
    quantize(Quantize(model=str(stories), out=str(out), quantizer="hqq", bits=3, group_size=SIZE))
    return out


def recipe(base: Path, data: str, out: Path, **changes: Any) -> Finetune:  # noqa: F811
    options = {"training": TRAINING, "lora": Lora(r=4), "merge": "zeros"} | changes
    return Finetune(model=str(base), data=data, out=str(out), **options)


@pytest.fixture(scope="module")
def trained(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("trained") / "a"
    finetune(recipe(base, data, out))
    return out


def adapted(model: Any, **options: Any) -> Any:
    """The model with an adapter of random numbers that is constant in groups, in eval mode."""
    made: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))
    keep_pooled(made)
    with torch.no_grad():
        for layer in zeros_layers(made).values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape))
            b *= 0.2 * layer.base_layer.dequantize().float().norm() / (layer.scaling["default"] * b @ a).norm()
    return made.eval()


def saved(base: str, folder: Path, **options: Any) -> torch.Tensor:
    """Writes such an adapter, marked; returns the logits of base and adapter."""
    model = adapted(load_model(base), **options)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "llmtools.json").write_text(json.dumps({"merge": "zeros"}))
    return logits(model)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if ".lora_A." in name}


def assert_constant(folder: Path, size: int) -> None:
    for name, a in factors(folder).items():
        for group in a.split(size, 1):
            assert torch.equal(group, group[:, :1].expand_as(group)), name


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_adapter_is_a_plain_peft_adapter_constant_in_groups(trained: Path, base: Path) -> None:
    assert merged_as(trained) == "zeros"
    assert "--merge zeros" in (trained / "README.md").read_text()
    assert_constant(trained, SIZE)
    assert all(len(a.unique()) > 4 for a in factors(trained).values())  # not constant over the whole row
    plain = peft.PeftModel.from_pretrained(load_model(base), str(trained)).eval()
    assert torch.equal(logits(plain), logits(load_model(trained)))
    assert not torch.equal(logits(plain), logits(load_model(base)))


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_it_stays_constant_whatever_the_optimizer(base: Path, data: str, tmp_path: Path, optim: str) -> None:  # noqa: F811
    finetune(recipe(base, data, tmp_path / "a", training=TRAINING | {"optim": optim, "weight_decay": 0.1}))
    assert_constant(tmp_path / "a", SIZE)


def test_the_gradient_is_the_one_of_the_pooled_matrix() -> None:
    """Averaging is the projection: the loss falls along it as along the gradient of one number a group."""
    torch.manual_seed(0)
    linear = nn.Linear(80, 24, bias=False)
    layer = QuantizedLinear.from_linear(linear, quantizer("hqq", group_size=24))  # groups of 24, 24, 24 and 8
    model: Any = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=3, target_modules=["0"]))
    keep_pooled(model)
    (tuner,) = zeros_layers(model).values()
    a, b = tuner.lora_A["default"].weight, tuner.lora_B["default"].weight
    nn.init.normal_(b)
    x, wanted = torch.randn(7, 80), torch.randn(7, 24)
    (model(x) - wanted).square().sum().backward()
    sizes = torch.tensor([24, 24, 24, 8])
    small = a.detach()[:, [0, 24, 48, 72]].clone().requires_grad_()
    free = small.repeat_interleave(sizes, 1)
    y = x @ layer.dequantize().T + tuner.scaling["default"] * (x @ free.T @ b.detach().T)
    (y - wanted).square().sum().backward()
    assert a.grad is not None and small.grad is not None
    torch.testing.assert_close(a.grad, (small.grad / sizes).repeat_interleave(sizes, 1), rtol=1e-4, atol=1e-4)


def test_a_stopped_run_resumes_with_the_same_bits(trained: Path, base: Path, data: str, tmp_path: Path) -> None:  # noqa: F811
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        finetune(recipe(base, data, tmp_path / "a"), callbacks=[Stop()])
    finetune(recipe(base, data, tmp_path / "a", resume=True))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", trained))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_warmup": 0.5}, "goes with --merge exact"),
        ({"lora": Lora(init="error")}, "lora.init=error"),
        ({"lora": Lora(options={"use_dora": True})}, "--merge zeros.*use_dora"),
        ({"lora": Lora(target_modules=["embed_tokens", "q_proj"])}, "embed_tokens: --merge zeros"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(
    base: Path,
    data: str,  # noqa: F811
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        finetune(recipe(base, data, tmp_path / "a", **changes))
    assert not list(tmp_path.iterdir())


def test_a_base_of_integer_zero_points_is_refused_by_name(stories: Path, data: str, tmp_path: Path) -> None:  # noqa: F811
    quantize(Quantize(model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", bits=4))
    with pytest.raises(InputError, match=r"q_proj is quantized by RTN.*hqq.*Q4_1 and Q5_1"):
        finetune(recipe(tmp_path / "q", data, tmp_path / "a"))
    assert [each.name for each in tmp_path.iterdir()] == ["q"]
    saved_base = tmp_path / "q"
    with pytest.raises(InputError, match="not quantized"):
        finetune(recipe(stories, data, tmp_path / "a"))
    assert saved_base.exists()


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_what_was_trained_is_merged_into_zero_points(trained: Path, base: Path, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("One day Tom had a red ball. " * 60)
    result = merge(Merge(adapter=str(trained), out=str(tmp_path / "m"), data=str(text), max_length=64))
    assert result.how == "zeros" and result.rounding_error is not None and result.rounding_error < 0.05
    assert result.comparison is not None and result.comparison.kl is not None and result.comparison.kl < 1e-3
    before, after = quantized_linears(load_model(base)), quantized_linears(load_model(tmp_path / "m", verify=True))
    assert all(before[path].quantizer == after[path].quantizer for path in before)
    for path, layer in before.items():
        assert {name for name in layer.packed if not torch.equal(layer.packed[name], after[path].packed[name])} == {
            "zeros"
        }


@pytest.mark.parametrize(
    ("scale_type", "allowed"), [("float32", 1e-5), ("float16", 2**-10), ("bfloat16", 2**-7)], ids=str
)
@pytest.mark.parametrize("group_size", [16, 24, -1], ids=str)
def test_merged_logits_are_those_of_base_and_adapter(scale_type: str, allowed: float, group_size: int) -> None:
    model = tiny_model("llama")
    llmtools.quantize(model, "hqq", bits=4, group_size=group_size, scale_type=scale_type)
    tuned = adapted(model)
    expected = logits(tuned)
    former = {name.removesuffix(".base_layer"): each for name, each in quantized_linears(tuned).items()}
    weights = {
        path.removeprefix("base_model.model."): layer.dequantize(dtype=torch.float32)
        + tuned.get_submodule(path).get_delta_weight("default")
        for path, layer in former.items()
    }
    merged, lost = merge_into_packed(tuned, zeros=True)
    for path, layer in quantized_linears(merged).items():
        scale = layer.packed["scales"].float()
        size = layer.quantizer.shift_group(layer.in_features)
        step = (scale * (1 + layer.packed["zeros"].float().abs())).repeat_interleave(size, 1)[:, : layer.in_features]
        error = (layer.dequantize(dtype=torch.float32) - weights[path]).abs()
        assert bool((error <= allowed * step + 1e-6).all()), path
    assert max(lost.values()) < 100 * allowed
    if scale_type == "float32":
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_merge_has_the_same_weights() -> None:
    made = []
    for dense in (True, False):
        torch.manual_seed(1)
        model = tiny_model("llama")
        llmtools.quantize(model, "hqq", bits=4, group_size=16, scale_type="float32")
        tuned = adapted(model)
        made.append(merge_dense(tuned, torch.float32) if dense else merge_into_packed(tuned, zeros=True)[0])
    torch.testing.assert_close(logits(made[1]), logits(made[0]), rtol=1e-5, atol=1e-5)


def test_a_hqq_folder_is_written_back_with_other_zero_points(tmp_path: Path) -> None:
    write(tmp_path / "base", test_hqq.writer(4, 1), test_hqq.CONFIG)
    expected = saved(str(tmp_path / "base"), tmp_path / "a")
    merge(Merge(model=str(tmp_path / "base"), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    torch.testing.assert_close(logits(load_model(tmp_path / "m", verify=True)), expected, rtol=1e-5, atol=1e-5)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "m"))
    assert (tmp_path / "m" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".zero")}


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_a_gguf_file_is_written_back_with_other_minima(kind: str, tmp_path: Path) -> None:
    from tests.formats.test_gguf_reading import KINDS, write_gguf

    pytest.importorskip("gguf")
    file = write_gguf(tmp_path, kinds=dict.fromkeys([*KINDS, "ffn_gate", "ffn_up"], kind))
    expected = saved(str(file), tmp_path / "a", exclude_modules=["lm_head"])
    merge(Merge(model=str(file), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    got = load_model(str(tmp_path / "m" / "m.gguf"))
    former = quantized_linears(load_model(str(file)))
    weights = merge_dense(llmtools.load(tmp_path / "a")[0], torch.float32)
    for path, layer in quantized_linears(got).items():
        if "lm_head" in path:
            continue
        wanted, blocks = weights.get_submodule(path).weight, layer.packed["blocks"]
        minima = layer.quantizer.unpacked(layer.packed)["minima"].float().abs().repeat_interleave(32, 1)
        error = (layer.dequantize(dtype=torch.float32) - wanted).abs()
        assert bool((error <= 2**-11 * minima + 1e-6 * (1 + wanted.abs())).all()), path
        bytes_of = blocks.unflatten(1, (-1, 20 if kind == "Q4_1" else 24))
        before = former[path].packed["blocks"].view_as(bytes_of)
        assert torch.equal(bytes_of[..., :2], before[..., :2]) and torch.equal(bytes_of[..., 4:], before[..., 4:])
        assert not torch.equal(bytes_of, before)
    torch.testing.assert_close(logits(got), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_linears_with_minima_of_a_mixed_file_can_be_named(data: str, tmp_path: Path) -> None:  # noqa: F811
    from tests.formats.test_gguf_reading import write_gguf

    pytest.importorskip("gguf")
    file = write_gguf(tmp_path)
    with pytest.raises(InputError, match=r"q_proj is quantized by GGMLBlocks\(type='Q4_K'\)"):
        finetune(recipe(file, data, tmp_path / "a"))
    with pytest.raises(InputError, match=r"down_proj is quantized by.*Q8_0"):
        finetune(recipe(file, data, tmp_path / "a", lora=Lora(target_modules=["up_proj", "down_proj"])))
    assert not (tmp_path / "a").exists()
    assert saved(str(file), tmp_path / "a", target_modules=["gate_proj", "up_proj"]).isfinite().all()
    merge(Merge(model=str(file), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))


def test_ways_that_do_not_fit_the_training_are_refused(trained: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--how exact.*not trained with `finetune --merge exact`"):
        merge(Merge(adapter=str(trained), out=str(tmp_path / "m"), how="exact"))
    saved(str(base), tmp_path / "plain")
    (tmp_path / "plain" / "llmtools.json").unlink()
    asked = Merge(model=str(base), adapter=str(tmp_path / "plain"), out=str(tmp_path / "m"), how="zeros")
    with pytest.raises(InputError, match=r"--how zeros.*not trained with `finetune --merge zeros`"):
        merge(asked)
    assert not (tmp_path / "m").exists()
    assert merge(replace(asked, how="round")).how == "round"


def test_an_adapter_of_other_groups_is_refused_before_any_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtools.recipes.merge._merged", lambda *args: pytest.fail("it was measured first"))
    saved(str(base), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = next(name for name in tensors if ".lora_A." in name)
    tensors[name][:, 5] *= 1.01
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not constant in the base's groups of 32 columns"):
        merge(Merge(model=str(base), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    assert not (tmp_path / "m").exists()


def test_a_zero_point_beyond_its_dtype_is_refused() -> None:
    linear = nn.Linear(64, 8)
    layer = QuantizedLinear.from_linear(linear, quantizer("hqq"))
    with pytest.raises(InputError, match=r"torch\.float16 cannot hold.*--how round"):
        layer.quantizer.shift(layer.packed, torch.full((8, 1), 1e6))


@pytest.mark.parametrize("name", ["rtn", "nf4", "quip_sharp", "affine_columns", "gguf"])
def test_quantizers_without_floating_zeros_refuse_to_move_them(name: str) -> None:
    kind = quantizer(name)
    assert kind.shift_group(64) is None
    with pytest.raises(InputError, match="--how round"):
        kind.shift({}, torch.zeros(1, 1))
