"""What every engine saves alike: the model's tensors and the random state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, CheckpointError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (shared ones once) and the buffers that belong to a model's state (not, say, rotary tables)."""
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


@torch.no_grad()
def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies parameters and persistent buffers from a checkpoint into a model of the same shape.

    Raises CheckpointError, naming the first tensor that does not fit, if the checkpoint is of another model.
    """
    tensors = checkpoint.tensors("model")
    wanted = model_tensors(model)
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))[0]
        where = "the checkpoint only" if odd in tensors else "the model only"
        raise CheckpointError(f"{checkpoint.path} belongs to another model: {odd} is in {where}")
    for name, target in wanted.items():
        source = tensors[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise CheckpointError(
                f"{checkpoint.path} belongs to another model: {name} is {tuple(source.shape)} {source.dtype}, "
                f"the model's is {tuple(target.shape)} {target.dtype}"
            )
        target.copy_(source)


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """torch's random state, of the CPU and of the device."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Restores `random_tensors`; the device's part only where it was saved on such a device."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
