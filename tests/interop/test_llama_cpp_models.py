"""llama.cpp itself (by xllamacpp) runs a GGUF file, and our adapter on it, with the probabilities that we compute.

Beside weights in blocks llama.cpp rounds activations to 8 bits, which shows in the third digit. So the figures are
compared on a copy of the file whose weights are the same numbers in float32; the file itself is held to less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import llmtools
from llmtools.formats.gguf import MIXTURES
from llmtools.formats.gguf_adapter import export_gguf_adapter
from llmtools.formats.writing import export
from llmtools.model.adapter_files import open_adapter
from tests.formats.test_gguf import mixture

pytestmark = pytest.mark.filterwarnings("ignore")
gguf: Any = pytest.importorskip("gguf")
llama: Any = pytest.importorskip("xllamacpp")

PROMPTS = (
    "Once upon a time", "The little dog", "One day, a girl named", "Tim and his mom went", "There was a big",
    "Lily saw a", "The cat was very", "He wanted to play", "It was a sunny", "She said,",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model as a GGUF file."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=8, group_size=32, symmetric=True, skip=["*down_proj", "lm_head"])
    export(model, tokenizer, folder / "base", "gguf", lossy=True)
    return folder / "base" / "model.gguf"


@pytest.fixture(scope="module")
def in_float32(base: Path) -> Path:
    """The same weights as float32."""
    return float32_copy(base, base.with_name("float32.gguf"))


def float32_copy(source: Path, target: Path) -> Path:
    """A GGUF file with the same metadata and the same numbers, as float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def server(path: Path, adapter: Path | None = None) -> Any:
    """llama.cpp with a model, on one thread."""
    options = llama.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(path), 256, 1, False
    options.cpuparams.n_threads = 1
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        options.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return llama.Server(options)


def divergence(model: Any, running: Any, ids: list[int]) -> float:
    """KL of our next token to llama.cpp's, over its likeliest ones."""
    asked = {"prompt": ids, "temperature": 0, "cache_prompt": False, "max_tokens": 1, "logprobs": 512}
    told = running.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    ours = ours[torch.tensor([each["id"] for each in told])]
    theirs = torch.tensor([each["logprob"] for each in told], dtype=torch.float64).clamp_min(-100)
    return float((ours.exp() * (ours - theirs)).sum())


def assert_alike(model: Any, tokenizer: Any, running: Any, most: float, *, texts: bool) -> None:
    """After each prompt the KL of next tokens is below `most`; with texts, greedy ones are equal."""
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert divergence(model, running, ids) < most
        if not texts:
            continue
        with torch.no_grad():
            done = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        asked = {"prompt": ids, "temperature": 0, "cache_prompt": False, "max_tokens": 12}
        text = running.handle_completions(asked)["choices"][0]["text"]
        assert tokenizer.decode(done, skip_special_tokens=True).strip() == text.strip()


def test_next_tokens_are_those_of_llama_cpp(base: Path, in_float32: Path) -> None:
    model, tokenizer = llmtools.load(base)
    assert_alike(model, tokenizer, server(in_float32), 1e-4, texts=True)
    assert_alike(model, tokenizer, server(base), 1e-3, texts=False)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_has_the_next_tokens_of_llama_cpp(family: str, stories: Path, tmp_path: Path) -> None:
    """From the file in float32: where activations are rounded, a token may get another expert."""
    model, tokenizer = mixture(family), AutoTokenizer.from_pretrained(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    export(model, tokenizer, tmp_path / "out", "gguf", reader="llama.cpp")
    in_float32 = float32_copy(tmp_path / "out" / "model.gguf", tmp_path / "float32.gguf")
    assert_alike(model, tokenizer, server(in_float32), 1e-4, texts=False)


def test_adapters_of_experts_do_the_same_there(stories: Path, tmp_path: Path) -> None:
    """Some experts without one, one of another rank."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = mixture("mixtral"), AutoTokenizer.from_pretrained(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    llmtools.save(model, tokenizer, tmp_path / "q")
    export(model, tokenizer, tmp_path / "out", "gguf", reader="llama.cpp")
    in_float32 = float32_copy(tmp_path / "out" / "model.gguf", tmp_path / "float32.gguf")
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    options = {"target_modules": ["q_proj", "w_down", "0.w_up", "2.w_up"], "rank_pattern": {"experts.2.w_up": 6}}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "q")
    for name, each in adapted.named_parameters():
        if "lora_" in name:
            each.data = 0.2 * torch.randn_like(each)
    adapted.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert (adapted(input_ids=ids).logits - before).abs().max() > 0.1
    skeleton = llmtools.checkpoint.folder.skeleton
    out = export_gguf_adapter(tmp_path / "a", tmp_path / "a.gguf", str(tmp_path / "q"), skeleton=skeleton)
    assert_alike(adapted, tokenizer, server(in_float32, out), 1e-4, texts=False)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 8}}], ids=str)
def test_an_adapter_does_the_same_there(base: Path, in_float32: Path, options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = llmtools.load(base)
    with torch.no_grad():
        before = model(input_ids=torch.tensor([tokenizer(PROMPTS[0]).input_ids])).logits
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    for name, each in adapted.named_parameters():
        if "lora_" in name:
            each.data = 0.05 * torch.randn_like(each)
    adapted.save_pretrained(tmp_path / "a")
    out = export_gguf_adapter(
        tmp_path / "a", tmp_path / "a.gguf", str(base), skeleton=llmtools.checkpoint.folder.skeleton
    )
    fresh, _ = llmtools.load(base)
    opened = open_adapter(fresh, tmp_path / "a").eval()
    with torch.no_grad():
        after = opened(input_ids=torch.tensor([tokenizer(PROMPTS[0]).input_ids])).logits
    assert (after - before).abs().max() > 0.1  # it changes something
    assert_alike(opened, tokenizer, server(in_float32, out), 1e-4, texts=True)
    assert_alike(opened, tokenizer, server(base, out), 1e-2, texts=False)


def test_an_adapter_of_a_checkpoint_goes_with_the_checkpoint_s_gguf(stories: Path, tmp_path: Path) -> None:
    """Quantized, adapted, and both exported by the commands; names come from the checkpoint, or from the file."""
    from peft import LoraConfig, get_peft_model

    from llmtools.cli.app import main
    from llmtools.model.fingerprint import FINGERPRINT, as_text, fingerprint

    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=8, group_size=32, symmetric=True, skip=["*down_proj", "lm_head"])
    llmtools.save(model, tokenizer, tmp_path / "q")
    known = as_text(fingerprint(model))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "q")
    for name, each in adapted.named_parameters():
        if "lora_" in name:
            each.data = 0.05 * torch.randn_like(each)
    adapted.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / FINGERPRINT).write_text(known)
    assert (
        main(["export", "--model", str(tmp_path / "q"), "--format", "gguf", "--out", str(tmp_path / "g"), "--lossy"])
        == 0
    )
    file, export_adapter = (
        tmp_path / "g" / "model.gguf",
        ["export", "--adapter", str(tmp_path / "a"), "--format", "gguf"],
    )
    assert main([*export_adapter, "--out", str(tmp_path / "a.gguf")]) == 0
    assert main([*export_adapter, "--out", str(tmp_path / "b.gguf"), "--model", str(file)]) == 2
    assert main([*export_adapter, "--out", str(tmp_path / "b.gguf"), "--model", str(file), "--allow_other_base"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    in_float32 = float32_copy(file, tmp_path / "float32.gguf")
    assert_alike(adapted.eval(), tokenizer, server(in_float32, tmp_path / "a.gguf"), 1e-4, texts=True)
