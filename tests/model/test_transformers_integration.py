"""What transformers does with our checkpoints: the same bits come back by every route, and damage is never silent."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import llmtools
from llmtools import CheckpointError, InputError, LLMToolsConfig, QuantizedLinear, Quantizer, quantizers
from llmtools.nn.swap import quantized_linears
from llmtools.quant import ALL, Packed, TensorSpec
from tests.models import FAMILIES, tiny_ids, tiny_model

IDS = tiny_ids()
DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def rtn(family: str = "llama", **changes: Any) -> Any:
    """A tiny model with two quantizers in it, quantized in place."""
    model = tiny_model(family, **changes)
    llmtools.quantize(model, "rtn", bits=3, group_size=32, overrides={"*layers.0.*": {"bits": 4}})
    return model


def rtn_simple(family: str) -> Any:
    model = tiny_model(family)
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized llama on the disk; not to be changed."""
    return saved(rtn(), tmp_path_factory.mktemp("hub") / "quantized")


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The logits of the model behind `checkpoint`."""
    return logits(rtn())


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def first_packed(folder: Path, *, floating: bool = False) -> str:
    """The key of a packed tensor of `DOWN`."""
    tensors = load_file(folder / WEIGHTS)
    return next(
        key
        for key in sorted(tensors)
        if key.startswith(f"{DOWN}.") and tensors[key].numel() and tensors[key].is_floating_point() == floating
    )


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal_after_a_round_trip_in_many_shards(family: str, tmp_path: Path) -> None:
    model = rtn_simple(family)
    folder = saved(model, tmp_path / "q", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    back, info = opened(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert quantized_linears(back).keys() == quantized_linears(model).keys()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {"bits": 2}),
        ("rtn", {"bits": 3, "symmetric": True}),
        ("rtn", {"bits": 4, "group_size": -1}),
        ("rtn", {"bits": 8, "group_size": 48}),
        ("nf4", {}),
        ("nf4", {"double_quantization": True}),
        ("optq", {"bits": 3, "group_size": 32}),
        ("optq", {"bits": 2, "act_order": True}),
    ],
    ids=str,
)
def test_every_quantizer_comes_back_bit_equal(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    llmtools.quantize(model, name, [tiny_ids(seed=1)] if quantizers.get(name).needs_hessian else None, **options)
    assert torch.equal(logits(opened(saved(model, tmp_path / "q"))), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto", torch.bfloat16], ids=str)
def test_packed_tensors_keep_their_types_whatever_dtype_is_asked_for(checkpoint: Path, dtype: Any) -> None:
    model, original = opened(checkpoint, dtype=dtype), rtn()
    wanted = {"auto": "float32"}.get(dtype, str(dtype).removeprefix("torch."))
    rotary = copy.deepcopy(original.model.rotary_emb)
    original.to(getattr(torch, wanted)).model.rotary_emb = rotary  # its float32 buffers, which loading does not cast
    assert model.dtype == getattr(torch, wanted)
    for path, layer in quantized_linears(model).items():
        for name, tensor in layer.packed.items():
            stored = original.get_submodule(path).packed[name]
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), f"{path}.{name}"
    assert torch.equal(logits(model), logits(original))


def test_a_bfloat16_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("opt").to(torch.bfloat16)
    llmtools.quantize(model, "rtn", bits=4, group_size=16)
    for back in (opened(saved(model, tmp_path / "q")), opened(tmp_path / "q", dtype="auto")):
        assert back.dtype == torch.bfloat16
        assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {"model": "cpu", "lm_head": "cpu"},
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"},
    ],
    ids=["cpu", "auto", "one", "two", "disk"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # accelerate speaks about offloading
def test_every_device_map_gives_the_same_logits(
    checkpoint: Path, expected: Tensor, device_map: Any, tmp_path: Path
) -> None:
    model = opened(checkpoint, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), expected)


def test_a_quantized_head_comes_back(tmp_path: Path) -> None:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32, skip=())
    back = opened(saved(model, tmp_path / "q"))
    assert isinstance(back.lm_head, QuantizedLinear)
    assert torch.equal(logits(back), logits(model))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    back = opened(saved(rtn("qwen3"), tmp_path / "q"))
    assert back.lm_head.weight is back.get_input_embeddings().weight


def test_the_bare_decoder_opens_from_the_same_folder(checkpoint: Path) -> None:
    whole, bare = opened(checkpoint), AutoModel.from_pretrained(checkpoint)
    with torch.no_grad():
        assert torch.equal(bare(input_ids=IDS).last_hidden_state, whole.model(input_ids=IDS).last_hidden_state)


def test_generation_copies_and_pickles_are_equal(checkpoint: Path, expected: Tensor) -> None:
    model = opened(checkpoint)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), rtn().generate(IDS, **options))


def test_a_loaded_model_can_be_saved_again(checkpoint: Path, expected: Tensor, tmp_path: Path) -> None:
    again = saved(opened(checkpoint), tmp_path / "again")
    assert torch.equal(logits(opened(again)), expected)
    first, second = load_file(checkpoint / WEIGHTS), load_file(again / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_quantized_layers_are_frozen_after_loading(tmp_path: Path) -> None:
    for layer in quantized_linears(opened(saved(rtn_simple("opt"), tmp_path / "q"))).values():
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_config_says_module_by_module_which_quantizer_made_it(checkpoint: Path) -> None:
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert stored.keys() == {"quant_method", "version", "quantizers", "modules"}
    assert stored["quant_method"] == "llmtools" and stored["version"] == 1
    assert [spec["bits"] for spec in stored["quantizers"]] == [4, 3]
    assert stored["modules"][DOWN] == 0 and stored["modules"]["model.layers.1.mlp.down_proj"] == 1
    assert len(stored["modules"]) == 14


def test_casting_a_model_leaves_the_packed_tensors_alone(checkpoint: Path) -> None:
    model = opened(checkpoint)
    before = {path: {n: t.clone() for n, t in layer.packed.items()} for path, layer in quantized_linears(model).items()}
    model.to(torch.bfloat16)
    for path, layer in quantized_linears(model).items():
        for name, tensor in layer.packed.items():
            assert tensor.dtype == before[path][name].dtype and torch.equal(tensor, before[path][name])
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


# ---- on the fly ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_on_the_fly_equals_quantizing_in_place(family: str, tmp_path: Path) -> None:
    dense = saved(tiny_model(family), tmp_path / "dense", max_shard_size="40KB")
    flying = opened(dense, quantization_config=LLMToolsConfig("nf4", group_size=32))
    standing = tiny_model(family)
    llmtools.quantize(standing, "nf4", group_size=32)
    assert torch.equal(logits(flying), logits(standing))
    assert torch.equal(logits(opened(saved(flying, tmp_path / "q"))), logits(standing))
    assert not any(p.requires_grad for layer in quantized_linears(flying).values() for p in layer.parameters())


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_on_the_fly_takes_overrides_skip_and_a_device_map(tmp_path: Path, device_map: str) -> None:
    wish = {"overrides": {"*down_proj": {"bits": 4}, "*k_proj": None, "*v_proj": {"name": "nf4"}}, "skip": ["*o_proj"]}
    dense = saved(tiny_model(), tmp_path / "dense")
    flying = opened(
        dense, device_map=device_map, quantization_config=LLMToolsConfig("rtn", bits=2, group_size=32, **wish)
    )
    standing = tiny_model()
    llmtools.quantize(standing, "rtn", bits=2, group_size=32, **wish)
    assert torch.equal(logits(flying), logits(standing))
    layer = flying.model.layers[0]
    assert type(layer.self_attn.k_proj) is nn.Linear and type(layer.self_attn.o_proj) is nn.Linear
    assert layer.mlp.down_proj.quantizer.bits == 4 and isinstance(flying.lm_head, QuantizedLinear)


def test_a_ready_quantizer_and_a_type_may_be_given(tmp_path: Path) -> None:
    dense = saved(tiny_model(), tmp_path / "dense")
    chosen = llmtools.quantizer("rtn", bits=3, group_size=32)
    flying = opened(dense, quantization_config=LLMToolsConfig(chosen), dtype="bfloat16")
    standing = opened(dense, dtype="bfloat16")
    llmtools.quantize(standing, chosen)
    assert torch.equal(logits(flying), logits(standing))


def test_a_calibrated_quantizer_is_refused_on_the_fly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'optq' needs calibration data.*llmtools quantize"):
        LLMToolsConfig("optq", bits=3)
    dense = saved(tiny_model(), tmp_path / "dense")
    config = LLMToolsConfig("rtn", group_size=32, overrides={"*down_proj": {"name": "optq"}})
    with pytest.raises(InputError, match="'optq' needs calibration data"):
        opened(dense, quantization_config=config)


def test_mistakes_in_the_wish_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'bits'"):
        LLMToolsConfig("rtn", bit=3)
    with pytest.raises(InputError, match="'rtm' is not known"):
        LLMToolsConfig("rtm")
    dense = saved(tiny_model(), tmp_path / "dense")
    with pytest.raises(InputError, match="names no quantizer"):
        opened(dense, quantization_config=LLMToolsConfig())
    with pytest.raises(InputError, match="nope"):
        opened(dense, quantization_config=LLMToolsConfig("rtn", overrides={"*nope*": None}))


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    dense = saved(tiny_model("gpt2"), tmp_path / "dense")
    with pytest.raises(InputError, match="Conv1D"):
        opened(dense, quantization_config=LLMToolsConfig("rtn"))


def test_nan_in_a_weight_is_named_on_the_fly(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(DOWN).weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"{DOWN}.*(NaN|infin|finite)"):
        opened(saved(model, tmp_path / "dense"), quantization_config=LLMToolsConfig("rtn", group_size=32))


def test_a_missing_weight_is_named_on_the_fly(tmp_path: Path) -> None:
    dense = saved(tiny_model(), tmp_path / "dense")
    edit_tensors(dense, lambda tensors: tensors.pop(f"{DOWN}.weight"))
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight is missing"):
        opened(dense, quantization_config=LLMToolsConfig("rtn", group_size=32))


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floating", [False, True], ids=["codes", "scales"])
def test_a_missing_tensor_is_named(damaged: Path, floating: bool) -> None:
    key = first_packed(damaged, floating=floating)
    edit_tensors(damaged, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        opened(damaged)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    folder = saved(rtn_simple("opt"), tmp_path / "q")
    edit_tensors(folder, lambda tensors: tensors.pop("model.decoder.layers.0.fc1.bias"))
    with pytest.raises(CheckpointError, match=r"model\.decoder\.layers\.0\.fc1\.bias is missing"):
        opened(folder)


def test_a_misshapen_tensor_is_named(damaged: Path) -> None:
    key = first_packed(damaged)

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key][:, :-1].contiguous()

    edit_tensors(damaged, cut)
    with pytest.raises(CheckpointError, match=f"{key} has shape .* expected"):
        opened(damaged)


def test_other_bits_in_the_config_are_noticed(damaged: Path) -> None:
    edit_config(damaged, lambda config: config["quantizers"][0].update(bits=2))
    with pytest.raises(CheckpointError, match="has shape"):
        opened(damaged)


def test_a_tensor_of_another_type_is_named(damaged: Path) -> None:
    key = first_packed(damaged, floating=True)
    edit_tensors(damaged, lambda tensors: tensors.update({key: tensors[key].to(torch.float64)}))
    with pytest.raises(CheckpointError, match=f"{key} is F64, expected"):
        opened(damaged)


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"device_map": "cpu"}], ids=str)
def test_a_truncated_file_is_named(damaged: Path, options: dict[str, str]) -> None:
    whole = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is truncated or damaged"):
        opened(damaged, **options)


def test_a_newer_format_is_refused(damaged: Path) -> None:
    edit_config(damaged, lambda config: config.update(version=99))
    with pytest.raises(CheckpointError, match=r"version 99.*upgrade"):
        opened(damaged)


@pytest.mark.parametrize("name", ["somebodys", "os:system", "antigravity:fly"])
def test_an_unknown_quantizer_is_named_and_nothing_is_imported(damaged: Path, name: str) -> None:
    edit_config(damaged, lambda config: config["quantizers"][0].update(name=name))
    with pytest.raises(CheckpointError, match=f"{name}.*(plug-in, install it|pass --plugin {name})"):
        opened(damaged)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"symmetric": "x"}, "symmetric='x'; bool is expected"),
        ({"bits": 99}, "bits=99"),
        ({"bitz": 3}, "option 'bitz'"),
    ],
)
def test_a_bad_option_of_a_known_quantizer_is_not_blamed_on_a_plug_in(
    damaged: Path, options: dict[str, Any], says: str
) -> None:
    edit_config(damaged, lambda config: config["quantizers"][0].update(options))
    with pytest.raises(CheckpointError, match=says) as refused:
        opened(damaged)
    assert "plug-in" not in str(refused.value) and "copy the checkpoint again" in str(refused.value)


def test_an_inconsistent_table_is_refused(damaged: Path) -> None:
    edit_config(damaged, lambda config: config["modules"].update({DOWN: 7}))
    with pytest.raises(CheckpointError, match=f"{DOWN} refers to quantizer 7"):
        opened(damaged)
    edit_config(damaged, lambda config: config["modules"].update({DOWN: 0, "model.layers.9.mlp.down_proj": 0}))
    with pytest.raises(CheckpointError, match=r"no module model\.layers\.9"):
        opened(damaged)
    edit_config(damaged, lambda config: config.update(colour="green"))
    with pytest.raises(CheckpointError, match="unknown keys 'colour'"):
        opened(damaged)


def test_pickled_weights_are_refused(damaged: Path) -> None:
    torch.save(load_file(damaged / WEIGHTS), damaged / "pytorch_model.bin")
    (damaged / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="unpickle nothing"):
        opened(damaged)


# ---- dense again, adapters, plug-ins ---------------------------------------------------------------------------------


def test_dequantize_gives_an_ordinary_model(checkpoint: Path, expected: Tensor, tmp_path: Path) -> None:
    model = opened(checkpoint).dequantize()
    assert not quantized_linears(model) and type(model.get_submodule(DOWN)) is nn.Linear
    torch.testing.assert_close(logits(model), expected)
    folder = saved(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(logits(opened(folder)), logits(model))


def test_a_model_with_adapters_in_it_is_not_saved_as_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = opened(checkpoint)
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match=r"carries adapters.*llmtools\.merge"):
        model.save_pretrained(tmp_path / "mixed")


@dataclass(frozen=True)
class Halves(Quantizer):
    """A stranger's quantizer: float16, and that is all."""

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"halves": TensorSpec((out_features, in_features), torch.float16)}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        return {"halves": weight.to(torch.float16)}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed["halves"][rows].to(dtype)


@pytest.fixture
def plugin() -> Iterator[str]:
    quantizers.register("halves")(Halves)
    yield "halves"
    quantizers._entries.pop("halves", None)


def test_a_plug_in_goes_through_and_is_missed_when_it_is_not_there(plugin: str, tmp_path: Path) -> None:
    dense = saved(tiny_model(), tmp_path / "dense")
    model = opened(dense, quantization_config=LLMToolsConfig(plugin))
    folder = saved(model, tmp_path / "q")
    assert torch.equal(logits(opened(folder)), logits(model))
    quantizers._entries.pop(plugin)
    with pytest.raises(CheckpointError, match=r"'halves'.*plug-in, install it"):
        opened(folder)


# ---- other processes -------------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_a_process_without_llmtools_fails_instead_of_guessing(checkpoint: Path) -> None:
    code = (
        f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}); print('SILENT')"
    )
    done = python(code)
    assert done.returncode != 0 and "SILENT" not in done.stdout
    assert "size" in done.stderr and "weight" in done.stderr
    assert "Unknown quantization type, got llmtools" in done.stderr  # what it takes to open the folder


OPEN = """
model = AutoModelForCausalLM.from_pretrained(FOLDER)
assert type(model.model.layers[0].mlp.down_proj).__name__ == "QuantizedLinear"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import llmtools; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import llmtools",
        "import transformers.modeling_utils, llmtools; from transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto, llmtools; from transformers import AutoModelForCausalLM",
        "import llmtools.model.transformers_integration; from transformers import AutoModelForCausalLM",
        "import llmtools, importlib; importlib.reload(llmtools._hook); importlib.reload(llmtools); "
        "from transformers import AutoModelForCausalLM; import llmtools.model.transformers_integration as hub; "
        "importlib.reload(hub); importlib.reload(llmtools); "
        "import transformers.quantizers.auto as auto; importlib.reload(hub)",
        "import llmtools, peft; from transformers import AutoModelForCausalLM",
        "import peft, llmtools; from transformers import AutoModelForCausalLM",
    ],
    ids=["ours-first", "theirs-first", "modeling", "registry", "hub", "reloads", "before-peft", "after-peft"],
)
def test_the_order_of_imports_does_not_matter(checkpoint: Path, imports: str) -> None:
    done = python(f"FOLDER = {str(checkpoint)!r}\n{imports}\n{OPEN}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_reloaded_registry_knows_us_again() -> None:
    code = """
import importlib, llmtools, transformers.quantizers.auto as auto
assert "llmtools" in auto.AUTO_QUANTIZER_MAPPING
importlib.reload(auto)
assert "llmtools" in auto.AUTO_QUANTIZER_MAPPING and "llmtools" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_llmtools_imports_neither_torch_nor_transformers() -> None:
    done = python("import sys, llmtools; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
