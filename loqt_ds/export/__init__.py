"""Write what was trained as others load it: merged 4-bit (bitsandbytes layout), merged bf16, a PEFT adapter, or GGUF.

    W_export = NF4(W_q + s · (P, B product))        one merge in float32, one quantization, each layer by itself

Where B is zero the stored codes are already the answer and are copied. The price of the format is the rounding of that
one merge, ‖W_eff − W_export‖ / ‖W_eff‖; it is reported for every layer, and nothing else may differ: before the
directory gets its name it is loaded again with transformers and compared, codes and logits.

Source of the layout: what transformers 5.23 and bitsandbytes 0.50.2 write and read (EXPORT.md of the design).
Departures from them: nothing here runs a bitsandbytes module, and values are quantized from float32, while transformers
quantizes the bf16 values it has loaded.

An adapter costs none of that rounding: it keeps W_q as it is and holds P and B beside it.

`pack` makes the tensors of one layer, `writer` the directory, `verify` loads it again, `run` is the journey from a
model or checkpoint to a report; `adapter` and `base` are about adapters, `gguf` about GGUF files, `loading` about using
any of them; `python -m loqt_ds.export` is the command.
"""

from __future__ import annotations

from loqt_ds.export.loading import load_export
from loqt_ds.export.report import ExportError, ExportReport, LayerReport
from loqt_ds.export.run import FORMATS, check_export, check_shared_base, export_checkpoint, export_model

__all__ = [
    "FORMATS",
    "ExportError",
    "ExportReport",
    "LayerReport",
    "check_export",
    "check_shared_base",
    "export_checkpoint",
    "export_model",
    "load_export",
]
