"""What of a plan's entries is alive together in which phase of a run, or moment of one."""

from __future__ import annotations

from loqt_ds.config import Config
from loqt_ds.memory.division import Division

STAYS = ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "masters", "moments", "buffers")
_MODEL = ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "buffers")
_GATHERED = ("gathered_root", "gathered_blocks")
Phases = dict[str, tuple[str, ...]]


def phases_of(config: Config, division: Division) -> Phases:
    """Phase (start, step, re-initialization, evaluation, export), or moment of one -> what is alive in it. What is not
    there at all has no bytes.

    With one micro-batch a step, activations go as gradients come: the larger of the two counts. With several, the
    gradients of earlier ones are there all the time.
    """
    always = (*STAYS, "context", "dequantized", "dequantized_kept")
    phases: Phases = {"start": (*_MODEL, "context", "start_made", "start_workspace")}
    if division.layout == "rows":
        phases["start: sharding"] = (*_MODEL, "context", "start_cast")
    phases |= _step(config, division, always)
    phases |= _reinit(config, division, always)
    if config.eval.metric == "exact_match":
        phases["evaluation"] = (*always, "gathered_root", "gathered_all", "answers")
    if config.export.format != "none" and not (division.frozen and config.train.device != "cpu"):
        # A card without room for two models exports from the host (loqt_ds.finish), and ranks that share W and P do so
        # in any case; masters wait there too.
        phases["export"] = ("context", "export_trained", "export_model", "export_workspace", "answers")
    return phases


def _while_backward_begins(config: Config) -> tuple[str, ...]:
    """Of earlier micro-batches."""
    return ("gradients",) if config.train.gradient_accumulation_steps > 1 else ()


def _first_backward(config: Config, always: tuple[str, ...]) -> tuple[str, ...]:
    """While the first block's backward runs, all other activations are there."""
    passing = ("activations", "recomputed_block", "block_workspace", "new_gradient", "buckets", *_GATHERED)
    return (*always, *passing, *_while_backward_begins(config))


def _step(config: Config, division: Division, always: tuple[str, ...]) -> Phases:
    kept = _while_backward_begins(config)
    update = (*always, "gradients", "update_workspace")
    if config.optim.layerwise:  # of the head first, while all activations are there
        update = (*always, "activations", "new_gradient", *kept, "update_workspace")
    last = (*always, "gradients", "new_gradient")
    phases: Phases = {
        "the loss": (*always, "activations", "loss", "new_gradient", *_GATHERED, *kept),
        "the first block's backward": _first_backward(config, always),
        "the last block's backward": (*last, "buckets", *_GATHERED),
    }
    if division.layout == "rows":
        phases["the last reduction"] = (*always, "gradients", "root_buckets")
    phases["the update"] = update
    return {f"step: {moment}": alive for moment, alive in phases.items()}


def _reinit(config: Config, division: Division, always: tuple[str, ...]) -> Phases:
    steps, layerwise = config.train.gradient_accumulation_steps, config.optim.layerwise
    one_process = division.world_size == 1
    kept = _while_backward_begins(config)
    summed = ("reinit_gathered",) if steps > 1 else ()
    tapped = (*_first_backward(config, always), "tapped_inputs")
    last = (*always, "gradients", "new_gradient")
    loss = (*always, "activations", "tapped_inputs", "loss", "new_gradient", *_GATHERED, *kept, *summed)
    phases: Phases = {"the loss": loss}
    if one_process:
        phases["the first block's backward"] = (*tapped, "reinit_gathered", "reinit_decompose")
    else:
        phases["the first block's backward"] = (*tapped, "reinit_begun")
    if one_process and layerwise:
        phases["the update"] = (
            *(*always, "activations", "new_gradient", *kept, "update_workspace"),
            *("tapped_inputs", *summed),
        )
        phases["a layer"] = (
            *(*always, "activations", "recomputed_block", "tapped_inputs", *kept, "reinit_rebuild"),
            *summed,
        )
    elif one_process:
        phases["the last block's backward"] = (*last, "reinit_pending", "buckets", *_GATHERED, "reinit_decompose")
        if division.layout == "rows":
            phases["the last reduction"] = (*always, "gradients", "reinit_pending", "root_buckets")
        phases["a layer"] = (*always, "reinit_pending", "reinit_packed", "reinit_rebuild")
    else:
        phases["the last block's backward"] = (*last, "reinit_gathered", "buckets", *_GATHERED)
        # A rank lets go of the others' layers as soon as their sums are with their owners.
        after = (*always, "reinit_owned")
        if division.layout == "rows":
            phases["the last reduction"] = (*after, "gradients", "root_buckets")
        else:
            after = (*after, "gradients")  # DeepSpeed lets go of them at the next backward
        phases["finding P"] = (*after, "reinit_packed", "reinit_decompose")
        phases["a layer"] = (*after, "reinit_packed", "reinit_rebuild")
    return {f"re-initialization: {moment}": alive for moment, alive in phases.items()}
