"""What earlier versions have written opens, and computes what it computed then (`tests/golden.py` wrote it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llmtools
from llmtools.nn.swap import quantized_linears
from llmtools.quant import from_spec
from tests.golden import KINDS, logits

GOLDEN = Path(__file__).resolve().parent.parent / "assets" / "golden"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 10; processors sum in other orders


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_earlier_version_opens(kind: str) -> None:
    folder = GOLDEN / kind
    stored, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    model, _ = llmtools.load(folder, dtype=torch.float32)
    layers = quantized_linears(model)
    assert len(layers) == 7
    for path, layer in layers.items():
        names = {name.removeprefix(f"{path}.") for name in stored if name.startswith(f"{path}.")}
        assert set(layer.packed) == names - {"weight"}  # an empty stand-in, for older transformers
        assert all(torch.equal(tensor, stored[f"{path}.{name}"]) for name, tensor in layer.packed.items())
        rows = layer.dequantize(slice(0, 4))
        if "su" in names:  # rotated back by sums, in an order of the processor's
            torch.testing.assert_close(rows, expected[path], **CLOSE)
        else:
            assert torch.equal(rows, expected[path])
    torch.testing.assert_close(logits(model), expected["logits"], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_writes_its_options_as_earlier_versions_did(kind: str) -> None:
    """Else those could not open what this one writes."""
    config = json.loads((GOLDEN / kind / "config.json").read_text())["quantization_config"]
    name, options = KINDS[kind]
    for spec in config["quantizers"]:
        assert spec["name"] == name and options.items() <= spec.items()
        assert from_spec(spec).spec() == spec


def test_an_adapter_of_an_earlier_version_opens() -> None:
    pytest.importorskip("peft")
    from llmtools.model.adapter_files import check_adapter, open_adapter

    folder = GOLDEN / "adapter"
    assert check_adapter(folder)["r"] == 2
    base, _ = llmtools.load(GOLDEN / "rtn", dtype=torch.float32)
    plain = logits(base)
    adapted = logits(open_adapter(base, folder, verify=True).eval())
    torch.testing.assert_close(adapted, load_file(folder / "expected.safetensors")["logits"], **CLOSE)
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_the_record_of_an_earlier_run_is_still_read() -> None:
    """`evaluate` takes the prompt template and the options that an adapter was trained with from its run.json."""
    from llmtools.checkpoint.loading import options_of, prompt_format_of

    folder = str(GOLDEN / "adapter")
    assert (
        prompt_format_of(folder) == {"record_format": "prompt", "template": None} and options_of(folder, "text") == {}
    )
