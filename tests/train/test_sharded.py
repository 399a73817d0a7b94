"""FSDP2 over packed weights: the shards of two processes train what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def trained(count: int, quantizer: str, out: Path) -> Any:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *launcher, "-m", "tests.train.sharded", str(out), quantizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason="FSDP2 shards integers from torch 2.12 on"
)
def test_two_shards_train_the_adapter_of_one_process(tmp_path: Path) -> None:
    one, two = (trained(count, "rtn", tmp_path / f"{count}.pt") for count in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][2] < one["losses"][0]
    whole, shard = two["shapes"]
    assert shard == [whole[0] // 2, *whole[1:]]
    assert one["adapter"].keys() == two["adapter"].keys()
    for name, tensor in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][name], tensor, rtol=1e-3, atol=1e-5)
