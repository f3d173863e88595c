"""What a run will need on one device, or on each of several ranks, counted before anything is allocated.

The model is built on the meta device and converted as it will be for training, so that everything that stays is counted
exactly: packed W and P by `packed_layout`, trained parameters, masters, and moments tensor by tensor (bitsandbytes
keeps tensors below 4096 elements in 32 bits; others take 2 bytes an element and 8 bytes for each block of 256). What
comes and goes is estimated.

    facts        the model without its weights
    formulas     bytes of activations, loss, update, re-initialization
    division     what of all that a rank has, under ZeRO and FSDP2
    phases       what is alive together
    counting     the plan: entries, phases and their peaks
    machine      how much memory there is
    questions    does it fit, how many tokens at once, what would have to be given up
    command      `python tools/plan_memory.py`
"""

from loqt_ds.memory.counting import GIB, LABELS, MemoryPlan, plan
from loqt_ds.memory.division import Division, division_of
from loqt_ds.memory.facts import Facts, describe, planned_model
from loqt_ds.memory.formulas import moment_bytes
from loqt_ds.memory.machine import device_bytes
from loqt_ds.memory.phases import STAYS
from loqt_ds.memory.questions import Asker, check_fits, needs_lean

__all__ = [
    "GIB",
    "LABELS",
    "STAYS",
    "Asker",
    "Division",
    "Facts",
    "MemoryPlan",
    "check_fits",
    "describe",
    "device_bytes",
    "division_of",
    "moment_bytes",
    "needs_lean",
    "plan",
    "planned_model",
]
