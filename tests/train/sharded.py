"""Three steps of LoRA on a quantized model, sharded by FSDP2 over the processes that torchrun started, or on one.

    torchrun --nproc_per_node=2 -m tests.train.sharded OUT.pt QUANTIZER

Rank 0 writes the losses, the adapter, and the shapes of a packed tensor: the whole one and the shard.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import llmtools
from llmtools.ranks import processes, rank
from tests.models import tiny_ids, tiny_model


def main(out: str, quantizer: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model()
    llmtools.quantize(model, quantizer)
    torch.manual_seed(1)
    prepared = llmtools.prepare_for_training(model)
    adapted: Any = peft.get_peft_model(
        prepared, peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])
    )
    if processes() > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (processes(),))
        for layer in adapted.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(adapted, mesh=mesh)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    ids, losses = tiny_ids()[rank() :: processes()], []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if processes() > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / processes())
    state = get_model_state_dict(adapted, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    packed = next(each for name, each in adapted.named_parameters() if name.endswith("qweight"))
    local = packed.to_local() if processes() > 1 else packed
    if rank() == 0:
        adapter = {name: each for name, each in state.items() if "lora_" in name}
        torch.save({"losses": losses, "adapter": adapter, "shapes": (list(packed.shape), list(local.shape))}, out)
    if processes() > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads have been seen to abort a process that ends by itself


if __name__ == "__main__":
    main(*sys.argv[1:])
