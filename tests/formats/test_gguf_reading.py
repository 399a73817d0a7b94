"""GGUF files open as models that compute what transformers' own load computes, with weights that stay packed."""

from __future__ import annotations

import copy
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.checkpoint.folder import load_model
from llmtools.formats.gguf_reading import joined
from llmtools.nn.embedding import QuantizedEmbedding, TiedLinear
from llmtools.nn.swap import count_parameters, packed_bytes, packed_layers, quantized_linears
from tests.formats.writers import assert_planned
from tests.kernels.test_ggml import blocks
from tests.models import CONFIGS, tiny_ids

gguf: Any = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {"attn_q": "Q4_K", "attn_k": "Q6_K", "attn_v": "Q5_0", "attn_output": "Q2_K", "ffn_down": "Q8_0"}
"""Types of some weights; the others are Q4_1."""


def write_gguf(
    folder: Path,
    family: str = "llama",
    *,
    embedding: str = "Q8_0",
    kinds: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A tiny model of random blocks with a tokenizer of letters, as llama.cpp would lay it out.

    kinds: types of weights beside `KINDS`.
    """
    config = (CONFIGS | {"qwen3_moe": qwen3_moe_config})[family](
        **{"hidden_size": 256, "intermediate_size": 512} | changes
    )
    arch = {"llama": "LLAMA", "qwen3": "QWEN3", "gemma3": "GEMMA3", "qwen3_moe": "QWEN3MOE"}[family]
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]]
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    if family == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    words = ["<unk>", "<s>", "</s>", *(chr(letter) for letter in range(33, 127))]
    words += ["th", "he", *(f"w{index}" for index in range(config.vocab_size - len(words) - 2))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_hidden_layers)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        empty = AutoModelForCausalLM.from_config(config)
    for name, sizes in stored_shapes(empty):
        shape = torch.Size(sizes)
        layer, part = (name.split(".")[index] for index in (2, -2)) if "_exps" in name else ("", "")
        target = names.get_name(name, (".weight", ".bias")) or f"blk.{layer}.ffn_{part}.weight"
        if len(shape) == 1:
            writer.add_tensor(target, (1 + 0.1 * torch.randn(shape)).numpy())
            continue
        kind = (KINDS | (kinds or {})).get(target.split(".")[-2], "Q4_1")
        kind = embedding if target.startswith(("token_embd", "output.")) else kind
        if kind == "F16":
            writer.add_tensor(target, torch.randn(shape).half().numpy())
            continue
        packed = blocks(kind, shape[:-1].numel(), shape[-1]).reshape(*shape[:-1], -1).numpy()
        writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def stored_shapes(empty: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, as of a model with an expert by itself, and shapes of the file's tensors; experts are stacked."""
    for name, parameter in empty.named_parameters():
        if parameter.ndim < 3:
            yield name, tuple(parameter.shape)
        elif name.endswith("gate_up_proj"):
            experts, rows, columns = parameter.shape
            for part in ("gate_exps", "up_exps"):
                yield f"model.layers.{name.split('.')[2]}.mlp.experts.{part}.weight", (experts, rows // 2, columns)
        else:
            yield f"model.layers.{name.split('.')[2]}.mlp.experts.down_exps.weight", tuple(parameter.shape)


def qwen3_moe_config(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig

    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
    shape = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3MoeConfig(**shape | {"max_position_embeddings": 128, "head_dim": 64} | mixture | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny LLaMA with a tied, packed embedding."""
    torch.manual_seed(0)
    return write_gguf(tmp_path_factory.mktemp("gguf"), tie_word_embeddings=True).parent


def theirs(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def assert_same_logits(model: Any, other: Any) -> None:
    with torch.no_grad():
        got, expected = model(input_ids=tiny_ids()).logits, other(input_ids=tiny_ids()).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "embedding": "Q6_K"}),
        ("llama", {"tie_word_embeddings": True, "embedding": "F16"}),
        ("qwen3", {"head_dim": 128}),
        ("gemma3", {"head_dim": 256, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path, family, **options)
    model, _ = llmtools.load(path)
    other = theirs(path)
    assert len([each for each in quantized_linears(model) if each != "lm_head"]) == 14
    for layer_path, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(), other.get_submodule(layer_path).weight.detach())
    packed = options.get("embedding") != "F16"
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding) == packed
    assert isinstance(model.lm_head, TiedLinear) == (packed and model.config.tie_word_embeddings)
    assert_same_logits(model, other)


def test_experts_of_a_mixture_stay_packed_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write_gguf(tmp_path, "qwen3_moe", kinds={"ffn_down_exps": "Q6_K", "ffn_gate_inp": "F16"})
    model, other = llmtools.load(path)[0], theirs(path)
    layers = quantized_linears(model)
    names = ("w_gate", "w_up", "w_down")
    assert {
        f"model.layers.{i}.mlp.experts.{e}.{name}" for i in (0, 1) for e in range(4) for name in names
    } <= layers.keys()
    down = other.model.layers[1].mlp.experts.down_proj
    assert torch.equal(layers["model.layers.1.mlp.experts.3.w_down"].dequantize(dtype=torch.float32), down[3])
    assert_same_logits(model, other)
    llmtools.save(model, None, tmp_path / "ours")
    assert_same_logits(load_model(tmp_path / "ours"), model)


def test_a_folder_with_the_name_of_the_file_is_the_same(folder: Path) -> None:
    model, tokenizer = llmtools.load(folder, gguf_file="m.gguf")
    assert model.name_or_path == str(folder / "m.gguf") == joined(str(folder), "m.gguf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "[the]"
    assert tokenizer("the").input_ids and tokenizer.eos_token_id == 2


def test_a_step_on_it_is_planned(folder: Path) -> None:
    assert_planned(next(folder.glob("*.gguf")))


def test_what_is_saved_opens_again_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = llmtools.load(folder / "m.gguf")
    llmtools.save(model, tokenizer, tmp_path / "ours")
    again, words = llmtools.load(tmp_path / "ours", verify=True)
    assert isinstance(again.lm_head, TiedLinear) and again.lm_head.embedding is again.get_input_embeddings()
    assert words.chat_template == tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(again(input_ids=tiny_ids()).logits, model(input_ids=tiny_ids()).logits)
    size = (tmp_path / "ours" / "model.safetensors").stat().st_size
    assert size < packed_bytes(model) * 1.2  # the embedding is there once


def test_a_dense_model_comes_back_tied(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = llmtools.load(folder / "m.gguf")
    total = count_parameters(model).total
    dense = llmtools.dequantize(copy.deepcopy(model))
    assert dense.lm_head.weight is dense.get_input_embeddings().weight
    assert count_parameters(dense).total == total
    assert_same_logits(dense, theirs(folder / "m.gguf"))
    llmtools.save(dense, tokenizer, tmp_path / "dense")
    assert_same_logits(llmtools.load(tmp_path / "dense")[0], dense)


def test_adapters_train_and_merge(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = llmtools.load(folder / "m.gguf")
    adapted = get_peft_model(llmtools.prepare_for_training(model), LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert len(names) == 28 and not any("lm_head" in name for name in names)
    loss = adapted(input_ids=tiny_ids(), labels=tiny_ids()).loss
    loss.backward()
    assert all(
        each.grad is not None and bool(each.grad.any()) for name, each in adapted.named_parameters() if "lora_B" in name
    )
    torch.optim.SGD(adapted.parameters(), 1e-4).step()
    with torch.no_grad():
        trained = adapted.eval()(input_ids=tiny_ids()).logits
        merged = llmtools.merge(adapted)(input_ids=tiny_ids()).logits
    torch.testing.assert_close(merged, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max()))


def test_an_adapter_on_the_embedding_merges_into_it_alone(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = llmtools.load(folder / "m.gguf")
    head = model.lm_head.dequantize()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    for name, each in adapted.named_parameters():
        if "lora" in name:
            each.data = torch.randn_like(each) * 0.1
    with torch.no_grad():
        trained = adapted.eval()(input_ids=tiny_ids()).logits
        merged = llmtools.merge(adapted)
        torch.testing.assert_close(
            merged(input_ids=tiny_ids()).logits, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max())
        )
    assert torch.equal(merged.lm_head.weight, head) and not merged.config.tie_word_embeddings


def test_llama_3_rotations_are_taken_from_the_file(tmp_path: Path) -> None:
    from llmtools.formats.gguf_header import read_header
    from llmtools.formats.writing import export
    from tests.models import tiny_model

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = tiny_model("llama", rope_parameters=rope)
    llmtools.quantize(model, "rtn", bits=4, group_size=32, symmetric=True)
    export(model, None, tmp_path / "out", "gguf")
    assert "rope_freqs.weight" in read_header(tmp_path / "out" / "model.gguf").tensors
    again = llmtools.checkpoint.folder.load_model(tmp_path / "out" / "model.gguf")
    assert dict(again.config.rope_parameters) == rope
    assert_same_logits(again, model)


def test_what_cannot_be_opened_is_one_line(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"lemma"))
    for name, message in (
        ("cut.gguf", "is damaged"),
        ("other.gguf", "transformers makes no model of it"),
        ("none.gguf", "there is no file .*none.gguf; .* has cut.gguf, other.gguf"),
    ):
        with pytest.raises(llmtools.CheckpointError, match=message) as raised:
            llmtools.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(llmtools.CheckpointError, match="no checksums"):
        llmtools.load(folder / "m.gguf", verify=True)


def test_a_model_goes_back_into_a_gguf_file_with_the_same_blocks(folder: Path, tmp_path: Path) -> None:
    from llmtools.formats.gguf_header import read_header
    from llmtools.formats.writing import export

    model, tokenizer = llmtools.load(folder / "m.gguf")
    export(model, tokenizer, tmp_path / "out", "gguf")
    before, after = read_header(folder / "m.gguf"), read_header(tmp_path / "out" / "model.gguf")
    assert set(after.tensors) == set(before.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].kind == tensor.kind
        assert torch.equal(after.read(name), before.read(name))


def test_other_formats_have_the_embedding_dense(folder: Path, tmp_path: Path) -> None:
    from llmtools.formats.writing import export

    model, tokenizer = llmtools.load(folder / "m.gguf")
    with pytest.raises(llmtools.InputError, match="gguf is not a uniform grid"):
        export(model, tokenizer, tmp_path / "out", "gptq")
    export(model, tokenizer, tmp_path / "out", "gptq", lossy=True)
    again, _ = llmtools.load(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().dequantize())
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_commands_take_the_file_by_either_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from llmtools.cli.app import main

    told = []
    for model in (["--model", str(folder), "--gguf_file", "m.gguf"], ["--model", str(folder / "m.gguf")]):
        assert main(["plan", *model, "--max_length", "16", "--device", "cpu", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["memory"] == told[1]["memory"] and told[0]["model"] == told[1]["model"]
    assert told[0]["memory"]["packed"] == packed_bytes(llmtools.load(folder / "m.gguf")[0])
    assert main(["generate", "--model", str(folder / "none.gguf"), "--prompt", "x"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_run_on_a_file_depends_on_its_contents(folder: Path, tmp_path: Path) -> None:
    from llmtools.checkpoint.inputs import content_of_model

    (tmp_path / "copy.gguf").write_bytes((folder / "m.gguf").read_bytes())
    assert content_of_model(str(folder / "m.gguf")) == content_of_model(str(tmp_path / "copy.gguf")) != {}
    with (tmp_path / "copy.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert content_of_model(str(folder / "m.gguf")) != content_of_model(str(tmp_path / "copy.gguf"))


def test_serve_takes_the_file_by_any_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is given a folder that has the file's name, which requests then name, and that is gone afterwards."""
    from llmtools.cli import passthrough

    served: list[Any] = []

    def app(args: list[str], prog_name: str) -> None:
        served.append((args, Path(args[1]).resolve(), llmtools.load(args[1])[0]))

    monkeypatch.setattr(passthrough, "_app", lambda command: app)
    monkeypatch.setattr(passthrough, "NEEDS", {"serve": ()})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.json").write_text("{}")
    for model in (
        [str(folder), "--gguf_file", "m.gguf"],
        [str(folder), "--gguf_file=m.gguf"],
        [os.path.relpath(folder / "m.gguf")],
    ):
        assert passthrough.run("serve", [*model, "--decision-config=labels.json", "--port", "9999"]) == 0
    for args, place, model in served:
        assert args == ["serve", "m.gguf", f"--decision-config={tmp_path / 'labels.json'}", "--port", "9999"]
        assert not place.exists() and isinstance(model.lm_head, TiedLinear)
    assert len(served) == 3 and Path.cwd() == tmp_path
    with pytest.raises(llmtools.CheckpointError, match="there is no file"):
        passthrough.run("serve", [str(folder / "none.gguf")])


def test_a_server_that_is_ended_leaves_no_copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn shuts down at SIGTERM and then raises the signal again, and typer makes an exit code of the exception."""
    from llmtools.cli import passthrough

    def app(args: list[str], prog_name: str) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise SystemExit(1) from None

    monkeypatch.setattr(passthrough, "_app", lambda command: app)
    monkeypatch.setattr(passthrough, "NEEDS", {"serve": ()})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert passthrough.run("serve", [str(folder / "m.gguf")]) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_chat_names_the_model_as_the_server_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtools.cli import passthrough

    asked: list[list[str]] = []
    monkeypatch.setattr(passthrough, "_app", lambda command: lambda args, prog_name: asked.append(args))
    monkeypatch.setattr(passthrough, "NEEDS", {"chat": ()})
    for model in ([str(folder), "--gguf_file", "m.gguf"], ["elsewhere/m.gguf"], ["owner/name:m.gguf"], ["owner/name"]):
        assert passthrough.run("chat", [*model, "http://localhost:8000"]) == 0
    assert [args[1] for args in asked] == ["m.gguf", "m.gguf", "owner/name:m.gguf", "owner/name"]
