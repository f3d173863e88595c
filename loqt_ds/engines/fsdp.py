"""LoQT without DeepSpeed on several ranks: PyTorch's `fully_shard` (FSDP2) over the trained parameters, or over all.

Each block of the model, and then the rest of it, is `fully_shard`ed: B and the other trained parameters, their
gradients and optimizer states are divided over the ranks by rows, gathered for a block's forward and backward, and
gradients are averaged and scattered in every backward. What a rank keeps of a parameter is in float32 and its own
master, or in bf16 with stochastic rounding (`optim.master`); what is computed with is in the training dtype. Each
rank's rows of a parameter are updated by an optimizer of their own, so that 8-bit moments come in blocks of 256 of the
rank's rows; whether a parameter has them is decided by its whole size.

W and P are buffers of bytes that FSDP leaves alone, whole on every rank; or, with `fsdp.shard_frozen`, frozen
parameters, which it shards, gathers with the block that they belong to, and prefetches as it does any other (the bytes
as words of the training dtype, so that nothing is cast). At a re-initialization a layer's owner collects their bytes
from the ranks of its group, and scatters the new ones (`ShardedPacked`).

With `fsdp.num_replicas` the ranks are that many groups of consecutive ranks, each of which holds everything.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config
from loqt_ds.core.subspace import layer_seed
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.processes import prepare_to_meet
from loqt_ds.engines.state import (
    ShardedFactors,
    check_replicas,
    engine_state,
    own_part,
    own_rows,
    random_tensors,
    take_back,
    whole_tensors,
)
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import loqt_layers, task_head_parameters
from loqt_ds.method.description import training_dtype
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.optim import LearningRates, ParameterOptimizer, clipping_scale, freeze_full_rank, gradient_norm
from loqt_ds.optim import parameter_groups as find_groups
from loqt_ds.ranks import Ranks
from loqt_ds.shards import Fragment, Shard, ShardedState


def start_distributed(*, timeout_seconds: int) -> Ranks:
    """Starts or joins the process group, under torchrun or alone; returns the ranks over a group of their own.

    `timeout_seconds`: after which a collective that some rank does not join is an error.
    """
    prepare_to_meet()
    timeout = timedelta(seconds=timeout_seconds)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    if dist.get_world_size() == 1:
        return Ranks(device=device)
    # Its own group: sums of re-initializations run beside FSDP's and must not be mixed up with them.
    return Ranks(dist.new_group(timeout=timeout), device=device)


class Sharding:
    """Which ranks share what, and how a module is sharded over them. Made by all ranks together.

    Args:
        config: the whole configuration, with its dtype resolved.
        ranks: what `start_distributed` returned.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.ranks, self._config = ranks, config
        self.num_groups = config.fsdp.num_replicas
        self.group_size = ranks.world_size // self.num_groups
        self.frozen = config.fsdp.shard_frozen and self.group_size > 1
        self.dtype = training_dtype(config)
        if config.train.compile:
            # What a compiled block returns is a view, which a model must not change in place: none of transformers does
            # that to what a block returns.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        grid = torch.arange(ranks.world_size).view(self.num_groups, self.group_size)
        device_type = ranks.device.type
        if self.num_groups == 1:
            world = dist.group.WORLD
            assert world is not None
            self.mesh = DeviceMesh.from_group(world, device_type, mesh_dim_names=("shard",))
            self.group, self.replicas = world, None
            return
        timeout = timedelta(seconds=config.train.collective_timeout_seconds)
        self.group, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=timeout)
        self.replicas, _ = dist.new_subgroups_by_enumeration(grid.t().tolist(), timeout=timeout)
        names = ("replicate", "shard")
        self.mesh = DeviceMesh.from_group([self.replicas, self.group], device_type, mesh=grid, mesh_dim_names=names)

    def shard(self, model: nn.Module, block: nn.Module) -> None:
        """Shards a block of a model (or the model, the last), all of whose tensors are there. Collective."""
        if not self._config.optim.train_full_rank:
            freeze_full_rank(model, but=task_head_parameters(model))  # before precision is chosen: they need no master
        if self.frozen:
            for layer in loqt_layers(block).values():
                if not layer.packed_bytes.keys() & layer._parameters.keys():
                    layer.packed_to_parameters(self.dtype)
        if self._config.optim.master == "fp32":
            for parameter in block.parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # what goes in is in the right dtype, and targets that are numbers stay exact
        )
        again = self._config.fsdp.reshard_after_forward
        is_root = block is model
        # The rest of a model is needed again at once, by the loss.
        fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=again and not is_root)
        # Summed, then divided: in torch 2.8 gloo sums where it is asked for the average, and NCCL's of one rank is not
        # to be trusted.
        block.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


class ShardedPacked:
    """W and P in shards of bytes, for the controller (its `PackedStore`)."""

    def __init__(self, layers: Mapping[str, LoQTLinear], sharding: Sharding) -> None:
        self._layers, self._sharding = layers, sharding
        size = sharding.group_size
        self._own_group, self._place = divmod(sharding.ranks.rank, size)
        # As they are while no block is gathered.
        self._shards = {n: {k: getattr(layer, k) for k in layer.packed_bytes} for n, layer in layers.items()}

    def _split(self, owner: int) -> tuple[bool, int, bool]:
        """Of a layer's owner: whether it is in this rank's group, its place in its group, whether it is this rank."""
        group, place = divmod(owner, self._sharding.group_size)
        return group == self._own_group, place, owner == self._sharding.ranks.rank

    @torch.no_grad()
    def collect(self, name: str, owner: int) -> None:
        in_group, place, is_owner = self._split(owner)
        if not in_group:
            return
        whole = {}
        for key, shard in self._shards[name].items():
            own = nn.functional.pad(local := _local_bytes(shard), (0, self._each(shard) - local.numel()))
            parts = [torch.empty_like(own) for _ in range(self._sharding.group_size)] if is_owner else None
            dist.gather(own, parts, group=self._sharding.group, group_dst=place)
            if parts is not None:
                whole[key] = torch.cat(parts)[: self._layers[name].packed_bytes[key]]
        if is_owner:
            self._layers[name].hold_whole(whole)

    @torch.no_grad()
    def install(self, name: str, owner: int) -> None:
        in_group, place, is_owner = self._split(owner)
        sharding = self._sharding
        for key, shard in self._shards[name].items():
            local, each = _local_bytes(shard), self._each(shard)
            received = local.new_empty(each)
            if in_group:
                parts = None
                if is_owner:
                    whole = self._layers[name].packed_tensors()[key]
                    padded = nn.functional.pad(whole, (0, each * sharding.group_size - whole.numel()))
                    parts = list(padded.split(each))
                dist.scatter(received, parts, group=sharding.group, group_src=place)
            if sharding.replicas is not None:
                dist.broadcast(received, group_src=owner // sharding.group_size, group=sharding.replicas)
            local.copy_(received[: local.numel()])

    def release(self, name: str) -> None:
        self._layers[name].hold_whole(None)

    def _each(self, shard: DTensor) -> int:
        """Bytes of the largest part."""
        return -(-shard.numel() // self._sharding.group_size) * shard.dtype.itemsize


def _local_bytes(shard: DTensor) -> Tensor:
    """This rank's part as bytes, the same memory."""
    return shard.to_local().view(torch.uint8)


class FSDPEngine:
    """The `Engine` of several ranks without DeepSpeed.

    Args:
        model: converted, on its device, in its training dtype, its blocks sharded by `sharding` (see
            `conversion.materialize`); here it is sharded itself.
        config: the whole configuration.
        sharding: how.
        original: (layer name) -> original weight, for the first initialization; None if there is none to be had.
        rebuild: makes the same model without a tensor, on the meta device, to hold what is there after training.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        sharding: Sharding,
        *,
        original: Callable[[str], Tensor] | None,
        rebuild: Callable[[], nn.Module],
    ) -> None:
        self._config, self._sharding, self._rebuild = config, sharding, rebuild
        self.ranks, self.device = sharding.ranks, sharding.ranks.device
        layers = loqt_layers(model)
        for layer in layers.values():
            if not sharding.frozen:
                for buffer in layer.packed_tensors().values():
                    self.ranks.broadcast(buffer, 0)
        sharding.shard(model, model)
        self._model = model
        self._stream: Any = None  # of the device, on which the model is computed
        self._generator = torch.Generator(self.device)  # of rounding, seeded for every update
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizers: dict[str, ParameterOptimizer] = {}
        self._is_factor: dict[str, bool] = {}
        for group in find_groups(model, config.optim):
            for name, parameter in group.parameters.items():
                self._parameters[name], self._is_factor[name] = parameter, group.is_factor
                self._optimizers[name] = ParameterOptimizer(
                    nn.Parameter(_local(parameter)),
                    config.optim,
                    weight_decay=group.weight_decay,
                    generator=self._generator,
                    num_whole=parameter.numel(),
                )
        self._state = ShardedState(
            [self._shard(name) for name in self._parameters],
            self._parameters,
            ranks=self.ranks,
            num_replicas=sharding.num_groups,
        )
        self.controller = Controller(
            layers,
            config.loqt,
            ShardedFactors(self._state),
            original=original,
            seed=config.train.seed,
            ranks=self.ranks,
            packed=ShardedPacked(layers, sharding) if sharding.frozen else None,
            dtype=sharding.dtype,
        )
        self._rates = LearningRates(config, self.controller.schedule)
        self._step, self._micro_batch, self._open = 0, 0, False
        for name, parameter in self._parameters.items():
            if self._is_factor[name]:
                parameter.register_post_accumulate_grad_hook(self._complete_hook(name.removesuffix(".B")))

    def _shard(self, name: str) -> Shard:
        """This rank's rows of a parameter, which are their own master where they are more precise than what is
        computed with."""
        parameter, item = self._parameters[name], self._optimizers[name]
        width = parameter.numel() // max(1, parameter.shape[0])
        assert isinstance(parameter, DTensor)
        fragment = Fragment(name, own_rows(parameter).start * width, item.parameter.numel(), 0)
        is_copy = item.parameter.dtype != self._sharding.dtype
        return Shard(name, (fragment,), item.values, item.master, item.optimizer, is_copy)

    @property
    def network(self) -> nn.Module:
        return self._model

    @property
    def step_index(self) -> int:
        return self._step

    # ---------------------------------------------------------------- one micro-batch

    def __call__(self, **inputs: Any) -> Any:
        if self._model.training and torch.is_grad_enabled() and not self._open:
            self.controller.begin_step(self._step)
            self._open = True
        return self._model(**inputs)

    def backward(self, loss: Tensor) -> None:
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (loss / self._config.train.gradient_accumulation_steps).backward()
        if self._in_last_micro_batch:
            self.controller.backward_complete()

    @property
    def _in_last_micro_batch(self) -> bool:
        return self._open and self._micro_batch == self._config.train.gradient_accumulation_steps - 1

    def _complete_hook(self, layer: str) -> Callable[[Tensor], None]:
        """Runs when the gradient of a layer's B has been reduced and scattered."""

        def hook(_: Tensor) -> None:
            if self._in_last_micro_batch:
                # FSDP calls hooks on a stream of its own; what the taps gathered is computed on the model's.
                with torch.cuda.stream(self._stream):  # of no effect where there is none
                    self.controller.gradient_complete(layer)

        return hook

    def step(self) -> StepReport | None:
        """Raises ReplicaMismatch before and after a re-initialization if ranks that should do not hold the same."""
        self._micro_batch += 1
        if self._micro_batch < self._config.train.gradient_accumulation_steps:
            return None
        norm = self._update_all()
        applied = math.isfinite(norm)
        if applied and self.controller.active:
            self._check_replicas()  # afterwards all ranks hold what the owners have merged, damaged or not
        reinit = self.controller.end_step(applied)
        if reinit is not None:
            self._check_replicas()
        report = StepReport(self._step, applied, norm, *self._rates.at(self._step), reinit)
        self._step, self._micro_batch, self._open = self._step + 1, 0, False
        return report

    def _update_all(self) -> float:
        """Clips by the norm over all shards and updates this rank's; skips everything where a gradient is not finite.
        Returns the norm before clipping."""
        local = {n: _local(p.grad) for n, p in self._parameters.items() if isinstance(p.grad, DTensor)}
        norms = torch.stack([gradient_norm(gradient) for gradient in local.values()]).double()
        # float32 squares could overflow. Of one group, whichever this rank is in: replicas clip by the same bits.
        squares = self.ranks.all_gather(norms.square().sum())[: self._sharding.group_size].sum()
        norm = math.sqrt(squares.item()) if torch.isfinite(squares) else math.nan
        lr, lr_full_rank = self._rates.at(self._step)
        for name in list(local):
            gradient = local.pop(name)
            self._parameters[name].grad = None
            if math.isfinite(norm):
                item = self._optimizers[name]
                # torch 2.8 moves uneven shards at the first forward.
                item.parameter.data = _local(self._parameters[name])
                item.parameter.grad = gradient
                place = self.ranks.rank % self._sharding.group_size  # replicas round alike
                self._generator.manual_seed(layer_seed(self._config.train.seed, self._step, f"{name}/{place}"))
                scale = clipping_scale(norm, self._config.train.max_grad_norm)
                item.step(lr if self._is_factor[name] else lr_full_rank, gradient_scale=scale)
        return norm

    def _check_replicas(self) -> None:
        check_replicas(self._model, self.ranks, num_groups=self._sharding.num_groups)

    # ---------------------------------------------------------------- outside of training

    @contextmanager
    def evaluating(self, *, alone: bool) -> Iterator[None]:
        """See `Engine`. With `alone` all parameters are gathered."""
        parts = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        if alone:
            if self._sharding.frozen:
                raise ValueError("with fsdp.shard_frozen=true the ranks can only run the network together")
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        try:
            yield
        finally:
            for part in parts:
                if alone:
                    again = self._config.fsdp.reshard_after_forward and part is not self._model
                    part.set_reshard_after_forward(again, recurse=False)
                part.reshard()

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert not self._open, "a checkpoint is taken between steps"
        self._check_replicas()
        return {
            "model": own_part(self._model, self.ranks, dtype=self._sharding.dtype),
            "optimizer": self._state.saved(),
            "random": random_tensors(self.device),
        }

    def saved_state(self) -> dict[str, Any]:
        return engine_state("fsdp2", self._step, self.controller, self._state)

    def restore(self, checkpoint: Checkpoint) -> None:
        seed, dtype = self._config.train.seed, self._sharding.dtype
        take_back(checkpoint, self._model, self.controller, self._state, device=self.device, seed=seed, dtype=dtype)
        self._step = int(checkpoint.metadata["engine_state"]["step"])
        self._check_replicas()

    def masters(self) -> dict[str, Tensor]:
        return self._state.masters()

    @torch.no_grad()
    def release(self, *, keep: bool = True) -> None:
        """Frees optimizer states and masters, and makes the network of rank 0 a plain model again, on the host where W
        and P were sharded: one device need not have room for all of them. Collective."""
        self._optimizers.clear()
        self._parameters.clear()
        self.controller.layers = {}
        del self._state, self.controller.store, self.controller.packed
        if not keep:
            return
        device = torch.device("cpu") if self._sharding.frozen else self.device
        plain = self._rebuild() if self.ranks.is_main else None
        for name, tensor in whole_tensors(self._model, self._sharding.dtype):
            if plain is not None:
                _put(plain, name, tensor.detach().to(device))
        if plain is not None:
            self._model = plain.to(device)
            gc.collect()  # FSDP's modules hold one another, and the shards


def _local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, the same memory."""
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter or buffer of that name, and of the other names that it has in the model."""
    holder, short = _holder(model, name)
    before = getattr(holder, short)
    if not isinstance(before, nn.Parameter):
        holder._buffers[short] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=before.requires_grad)
    for other, found in list(model.named_parameters(remove_duplicate=False)):
        if found is before:
            other_holder, other_short = _holder(model, other)
            other_holder.register_parameter(other_short, parameter)


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and its name there."""
    parent, _, short = name.rpartition(".")
    return model.get_submodule(parent), short
