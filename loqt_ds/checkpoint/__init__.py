"""Checkpoints that a crash cannot damage: safetensors and JSON, written beside, synced, renamed.

A checkpoint is one directory, by default `ROOT/step_N/`:

    manifest.json        format version, size and SHA-256 of every other file, a checksum of itself
    metadata.json        what the trainer needs besides tensors (configuration, counters, data position)
    GROUP.safetensors    one file for each group of tensors ("model", "optimizer", ...); where several ranks save, one
                         file for each group and rank, GROUP-00001-of-00004.safetensors
    NAME/                directories copied in (the tokenizer)

Each rank writes its own part into `ROOT/.saving-step_N-TOKEN/`, every file and directory is synced, and when all ranks
have done so rank 0 writes the manifest and renames; older checkpoints are deleted only after that. Processes that die
at any moment therefore leave the last complete checkpoint as it was. Nothing is pickled, so loading a checkpoint of a
stranger runs no code.

"Newest" means written last, not highest step: a run that was resumed from an old checkpoint writes lower steps later,
and those are the ones to go on from. The manifest's `sequence` counts for this. `ROOT/latest`, a file with the name of
the newest directory, is for people and for habits of DeepSpeed; nothing here reads it.
"""

from loqt_ds.checkpoint.files import (
    GIB,
    CheckpointError,
    check_free_space,
    copy_file,
    fsync_directory,
    write_bytes,
    write_json,
    write_safetensors,
)
from loqt_ds.checkpoint.loading import Checkpoint, find_checkpoint, load_checkpoint
from loqt_ds.checkpoint.saving import delete_others, save_checkpoint

__all__ = [
    "GIB",
    "Checkpoint",
    "CheckpointError",
    "check_free_space",
    "copy_file",
    "delete_others",
    "find_checkpoint",
    "fsync_directory",
    "load_checkpoint",
    "save_checkpoint",
    "write_bytes",
    "write_json",
    "write_safetensors",
]
