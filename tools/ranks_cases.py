"""What `measure_ranks` trains: ways of dividing a model, and steps."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = ("first", "ordinary", "reinit", "accumulated")
# By the formulas only: with ZeRO-2, and with W and P sharded over that many ranks.
RECIPES = {"llama_130m": 2, "llama_350m": 2, "llama_1b": 4, "pretrain_7b_24gb": 8, "fsdp2_70b_8x24gb": 8}


@dataclass(frozen=True)
class Case:
    """One way to train.

    engine: zero1, zero2, fsdp2 (W and P whole on every rank), sharded (FSDP2 with fsdp.shard_frozen), or hybrid (the
    same in two groups).
    """

    method: str  # loqt or dense
    engine: str = "zero2"
    precision: str = "bf16"  # bf16 (fp32 masters), bf16 masters, fp32
    subspace: str = "auto"
    optimizer_state: str = "keep"

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def least_ranks(self) -> int:
        return 4 if self.engine == "hybrid" else 1

    def options(self) -> list[str]:
        found = [
            f"train.dtype={'fp32' if self.precision == 'fp32' else 'bf16'}",
            f"optim.master={'bf16' if self.precision == 'bf16 masters' else 'fp32'}",
            f"loqt.subspace={self.subspace}",
            f"loqt.optimizer_state={self.optimizer_state}",
        ]
        if self.is_zero:
            return found
        sharded = f"fsdp.shard_frozen={str(self.engine != 'fsdp2').lower()}"
        return [*found, "engine=fsdp2", sharded, f"fsdp.num_replicas={2 if self.engine == 'hybrid' else 1}"]


FSDP = ("fsdp2", "sharded", "hybrid")
CASES = (
    *(Case("loqt", engine) for engine in ("zero2", "zero1", *FSDP)),
    *(Case("loqt", engine, precision) for precision in ("bf16 masters", "fp32") for engine in ("zero2", "sharded")),
    *(Case("loqt", engine, subspace="sketch") for engine in ("zero2", "sharded")),
    *(Case("dense", engine) for engine in ("zero2", "fsdp2")),
)
SHORT_CASES = (  # of all shapes but the first
    *(Case("loqt", engine) for engine in ("zero2", *FSDP)),
    *(Case("dense", engine) for engine in ("zero2", "fsdp2")),
)
