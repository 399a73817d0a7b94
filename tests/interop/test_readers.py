"""The table of readers is what the readers do: each opens the exports that it is said to take, and stops at the others.

The models are quantized with the default options, asymmetric groups of 64, and with symmetric ones. vLLM is not run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools.formats import formats
from llmtools.formats.readers import READERS, refusal
from llmtools.formats.uniform import uniform_layers
from llmtools.formats.writing import export, writable
from llmtools.nn.swap import quantized_linears
from tests.interop.peers import LlamaCpp, assert_as_likely
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

NEEDS = {
    ("gptqmodel", "gptq"): ("gptqmodel",),
    ("gptqmodel", "gptq_v2"): ("gptqmodel",),
    ("transformers", "gptq"): ("gptqmodel", "optimum"),
    ("transformers", "gptq_v2"): ("gptqmodel", "optimum"),
    ("transformers", "compressed-tensors"): ("compressed_tensors",),
    ("transformers", "gguf"): ("gguf",),
    ("transformers", "dense"): (),
    ("llama.cpp", "gguf"): ("gguf", "xllamacpp"),
}
"""(reader, format) → the packages that it takes to try; what is not here is not said to be read, or is vLLM's"""


@pytest.fixture(scope="module", params=["rtn", "optq"])
def quantizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["asymmetric", "symmetric"])
def model(request: pytest.FixtureRequest, quantizer: str) -> Any:
    model = tiny_model(hidden_size=128, intermediate_size=256).half()
    calibration = [tiny_ids(1, 32, seed=seed) for seed in range(4)] if quantizer == "optq" else None
    llmtools.quantize(model, quantizer, calibration, **({"symmetric": True} if request.param else {}))
    return model


def by_transformers(folder: Path, form: str, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    named = {"gguf_file": "model.gguf"} if form == "gguf" else {}
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **named)(input_ids=ids).logits[0]
    return logits


def by_gptqmodel(folder: Path, form: str, ids: Tensor) -> Tensor:
    from gptqmodel import BACKEND, GPTQModel

    logits: Tensor = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH).model(input_ids=ids).logits[0]
    return logits


READ = {"transformers": by_transformers, "gptqmodel": by_gptqmodel}


@pytest.mark.parametrize(("reader", "form"), NEEDS, ids=str)
def test_a_reader_opens_what_the_table_says_and_nothing_else(
    reader: str, form: str, model: Any, stories: Path, tmp_path: Path
) -> None:
    for package in NEEDS[reader, form]:
        pytest.importorskip(package, exc_type=ImportError)
    from transformers import AutoTokenizer

    layers = list(uniform_layers(quantized_linears(model), formats.known("gptq_v2").limits, lossy=False)[0].values())
    refused = refusal(reader, form, layers)
    copied, tokenizer = copy.deepcopy(model), AutoTokenizer.from_pretrained(stories)
    if form == "dense":
        llmtools.save(llmtools.dequantize(copied), tokenizer, tmp_path / "out")
    else:
        export(copied, tokenizer, tmp_path / "out", form)
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].float()
        if reader == "llama.cpp":
            assert refused is None
            assert_as_likely(LlamaCpp(tmp_path / "out"), model)
        elif refused is None:
            got = READ[reader](tmp_path / "out", form, ids).float()
            assert (got - expected).norm() < 0.03 * expected.norm()  # GPTQModel computes in bfloat16 here
        else:
            with pytest.raises(Exception):  # noqa: B017 (whatever another program says)
                READ[reader](tmp_path / "out", form, ids)


def test_every_pair_that_is_said_to_work_is_tried() -> None:
    said = {
        (reader, form)
        for reader in READERS
        for form in (*writable(), "dense")
        if "does not read" not in (refusal(reader, form, []) or "")
    }
    assert {pair for pair in said if pair[0] != "vllm"} == set(NEEDS)
