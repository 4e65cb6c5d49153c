"""The DeepSpeed engine that takes the optimizer's steps."""

import logging
import os
from typing import Any

import torch
from torch import nn

from instaflow.world import join, world


def start_engine(
    module: nn.Module, *, batch: tuple[int, int], beta2: float, weight_decay: float, gradient_clipping: float
) -> Any:
    """A DeepSpeed engine over `module`, whose forward is its loss. `batch`: micro and global batch size.

    Nothing is compiled at its start: the optimizer is PyTorch's own fused AdamW, and on a CPU DeepSpeed's
    shared-memory collectives, which it would build with a C++ compiler for half a minute, stay off.
    """
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    micro_batch_size, global_batch_size = batch
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "train_batch_size": global_batch_size,
            "gradient_clipping": gradient_clipping,
            "steps_per_print": None,
        },
    )
    if world().size == 1:
        engine.enable_backward_allreduce = False  # it would copy every gradient for nobody
    return engine


def set_batch(engine: Any, micro_batch_size: int, global_batch_size: int) -> None:
    """Change the batch size between two phases."""
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(global_batch_size)
