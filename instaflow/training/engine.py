"""The DeepSpeed engine that takes the optimizer's steps, and the one place that knows where it keeps what.

ZeRO shards the optimizer's state over the processes (stage 1), the gradients too (2), and the parameters too (3). Each
process then steps "masters" of its own, flat float32 tensors that hold its part of the parameters; without ZeRO (0) the
masters are the parameters themselves. The moving average is kept beside AdamW's own state of a master, so that all of
it is sharded, gathered, saved and put back alike.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from instaflow.stages import TrainingStage
from instaflow.training.ema import Ema
from instaflow.world import join, world

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
PERSISTENT = 100_000  # stage 3 shards no parameter smaller than this: a gathering would cost more than it saves


class Engine:
    """Trains `module`, whose forward is its loss, as the settings say. `batch`: micro and global batch size.

    `at_times`, under ZeRO 0 to 2, is the part of it that takes no step while its attribute `rests` is set.
    All processes must call every method alike: under ZeRO each speaks with the others.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: TrainingStage,
        batch: tuple[int, int],
        at_times: nn.Module | None = None,
    ) -> None:
        self.module, self.stage, self.clipping = module, settings.zero_stage, settings.gradient_clipping
        self.at_times = at_times
        self.buffers = [name for name, value in self.tensors().items() if not isinstance(value, nn.Parameter)]
        self.apart = set(at_times.parameters()) if at_times else set()
        groups: list[list[nn.Parameter]] = [[], []] if at_times else [[]]
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups[parameter in self.apart].append(parameter)
        self.in_8_bits = settings.optimizer == "adamw-8bit"
        self.adamw = make_adamw(groups, settings)
        self.deepspeed = start_deepspeed(module, self.adamw, settings, batch)
        optimizer = self.deepspeed.optimizer
        self.masters: Sequence[Tensor] = {
            0: lambda: [parameter for group in groups for parameter in group],
            1: lambda: optimizer.single_partition_of_fp32_groups,
            2: lambda: optimizer.single_partition_of_fp32_groups,
            3: lambda: optimizer.fp32_partitioned_groups_flat,
        }[self.stage]()
        self.ema = Ema(self.averaged(), settings.ema_decay)
        for master, average in zip(self.masters, self.ema.averages, strict=False):
            moments = {key: self.moment(master, key) for key in MOMENTS}
            step = torch.zeros((), device=master.device)  # with the parameter, where a fused optimizer keeps it
            self.adamw.state[master] = {"step": step, **moments, AVERAGE: average}
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()  # tells which part of the state is which parameter's

    def moment(self, master: Tensor, key: str) -> Tensor:
        """One of AdamW's moments before the first step."""
        if self.in_8_bits:
            signed = key == "exp_avg"
            moment: Tensor = self.adamw._new_buffer(master, signed)  # type: ignore[attr-defined]
            return moment
        return torch.zeros_like(master, memory_format=torch.preserve_format)

    def set_batch(self, micro_batch_size: int, global_batch_size: int) -> None:
        """Change the batch size between two phases."""
        self.deepspeed.set_train_micro_batch_size(micro_batch_size)
        self.deepspeed.set_train_batch_size(global_batch_size)

    def accumulate(self, *arguments: Any, last: bool) -> Tensor:
        """Add a micro batch's share to the global batch's gradient; its loss. `last`: the batch is whole then."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        loss: Tensor = self.deepspeed(*arguments)
        self.deepspeed.backward(loss)
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """Update weights and average by the gradient gathered so far; its L2 norm before clipping.

        Where the norm is not finite, no weight is changed.
        """
        for group in self.adamw.param_groups:
            if isinstance(group["lr"], Tensor):  # where the step is compiled
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        norm = clip_gradients(self.module, self.clipping) if self.stage == 0 else 0.0
        if math.isfinite(norm):
            last = self.adamw.param_groups[-1]
            stepped = last["params"]
            if self.at_times and self.at_times.rests:
                last["params"] = []  # several processes and ZeRO give it a gradient of zeros, a step of AdamW's too
            self.deepspeed.step()
            last["params"] = stepped
            norm = norm if self.stage == 0 else float(self.deepspeed.get_global_grad_norm())
        if math.isfinite(norm):
            self.ema.update(self.averaged())
        return norm

    def ema_distance(self) -> float:
        """||θ - ω|| / ||θ||: how far the weights are from their average, over all processes."""
        squares = torch.zeros(2)
        for weights, average in self.own_parts():
            squares += torch.stack([(weights - average).square().sum(), weights.square().sum()]).cpu()
        if self.stage:
            dist.all_reduce(squares)
        return float((squares[0] / squares[1]).sqrt())

    def own_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights that this process steps, each with its average."""
        if self.stage < 3:
            yield from (
                (master.detach(), average) for master, average in zip(self.masters, self.ema.averages, strict=False)
            )
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for _, parameter in self.trained():
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            real = parameter.ds_numel - world().rank * size  # type: ignore[attr-defined]  # what follows only fills up
            parts = safe_get_local_fp32_param(parameter), safe_get_local_optimizer_state(parameter, AVERAGE)
            yield tuple(part.detach().flatten()[: max(0, real)] for part in parts)

    # --- weights and state --------------------------------------------------------------------------------------------

    def averaged(self) -> list[Tensor]:
        """What has a moving average: the masters, then the module's buffers."""
        return [*self.masters, *map(self.module.get_buffer, self.buffers)]

    def tensors(self) -> dict[str, Tensor]:
        """The module's parameters, perhaps shards, and buffers, as its state dict names them."""
        return self.module.state_dict(keep_vars=True)

    def parts(self) -> tuple[Iterator[tuple[str, Tensor]], ...]:
        """All that a checkpoint keeps: weights, their average, the optimizer's state."""
        return self.weights(), self.averages(), self.optimizer_state()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The module's state dict, whole and in float32, one entry after the other."""
        for name, value in self.tensors().items():
            yield name, self.whole(value) if isinstance(value, nn.Parameter) else value.detach()

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """The moving average of the module's state dict, as `weights` gives it."""
        buffers = dict(zip(self.buffers, self.ema.averages[len(self.masters) :], strict=True))
        for name, value in self.tensors().items():
            yield name, self.whole(value, AVERAGE) if isinstance(value, nn.Parameter) else buffers[name]

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state, whole: NAME/step, NAME/exp_avg and NAME/exp_avg_sq of each trained parameter.

        A moment in 8 bits is given by its parts, such as NAME/exp_avg/codes, for a resumed run to have the same bits.
        """
        for name, parameter in self.trained():
            yield f"{name}/step", self.adamw.state[self.stepped(parameter)[0]]["step"].clone()
            for key in MOMENTS:
                for part, value in parts_of(self.whole(parameter, key)).items():
                    yield f"{name}/{key}{part}", value

    def load(self, averages: Mapping[str, Tensor], updates: int, optimizer: Mapping[str, Tensor]) -> None:
        """Go on with an average, that is `updates` old, and AdamW's state as they were saved."""
        self.ema.updates = updates
        for name, average in zip(self.buffers, self.ema.averages[len(self.masters) :], strict=True):
            average.copy_(averages[name])
        for name, parameter in self.trained():
            self.put(parameter, AVERAGE, averages[name])
            for key in MOMENTS:
                if self.in_8_bits:
                    for part, own in parts_of(self.adamw.state[parameter][key]).items():
                        own.copy_(optimizer[f"{name}/{key}{part}"])
                else:
                    self.put(parameter, key, optimizer[f"{name}/{key}"])
            for master in self.stepped(parameter):
                self.adamw.state[master]["step"].copy_(optimizer[f"{name}/step"])

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad)

    def stepped(self, parameter: nn.Parameter) -> Sequence[Tensor]:
        """What AdamW steps in a parameter's place: itself, or the masters that it may be part of."""
        if self.stage == 0:
            return [parameter]
        return [self.masters[parameter in self.apart]] if self.stage < 3 else self.masters

    def whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A parameter or its state, float32 and in its own shape, gathered from all processes."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:  # and so without state: it is its own average
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        if self.stage == 0:
            return parameter.detach() if key is None else self.adamw.state[parameter][key]
        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    def put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set a parameter's state: each process takes its part of the whole `value`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if self.stage == 0:
            self.adamw.state[parameter][key].copy_(value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:  # not through safe_set_full: it fails where a parameter does not divide evenly
            size, place = parameter.ds_tensor.numel(), world()  # type: ignore[attr-defined]
            padded = functional.pad(value.flatten(), (0, size * place.size - value.numel()))
            safe_set_local_optimizer_state(parameter, padded[place.rank * size :][:size], key)

    def close(self) -> None:
        """End the training; the module holds its own, whole parameters again."""
        whole = {id(value): self.whole(value) for _, value in self.module.named_parameters()} if self.stage == 3 else {}
        self.deepspeed.destroy()
        for module in self.module.modules() if self.stage == 3 else ():
            module._parameters = {
                name: value if value is None else nn.Parameter(whole[id(value)], requires_grad=value.requires_grad)
                for name, value in module._parameters.items()
            }


def make_adamw(groups: list[list[nn.Parameter]], settings: TrainingStage) -> torch.optim.Optimizer:
    """AdamW of groups of parameters as the settings say; its learning rate is set at each step."""
    parameters = [{"params": group} for group in groups]
    betas, decay = (0.9, settings.adam_beta2), settings.weight_decay
    if settings.optimizer == "adamw-8bit":
        from torchao.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(parameters, lr=0.0, betas=betas, weight_decay=decay)
        return made
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=decay, fused=True)


def parts_of(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor is made of, by what follows its name: itself, or codes and scales of 8 bits."""
    if not hasattr(value, "__tensor_flatten__"):
        return {"": value}
    return {f"/{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def start_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingStage, batch: tuple[int, int]
) -> Any:
    """DeepSpeed's own engine.

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
    micro_batch_size, global_batch_size = batch
    zero: dict[str, Any] = {"stage": settings.zero_stage, "stage3_param_persistence_threshold": PERSISTENT}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": global_batch_size,
        "gradient_clipping": settings.gradient_clipping if settings.zero_stage else 0.0,  # else `step` has done so
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW is as good on a CPU, and needs no compiler
    }
    if settings.mixed_precision:
        config["torch_autocast"] = {"enabled": True, "dtype": settings.mixed_precision}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, dist_init_required=False, config=config)
    if world().size == 1 and settings.zero_stage == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient for nobody
    return engine


def clip_gradients(module: nn.Module, most: float) -> float:
    """Scale all gradients together to an L2 norm of at most `most`; the norm that they had."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt()
    torch._foreach_mul_(gradients, (torch.full_like(norm, most) / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
