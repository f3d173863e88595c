"""Write what was trained as a model directory that others load: merged 4-bit (bitsandbytes layout) or merged bf16.

    W_export = NF4(W_q + s · (P, B product))        one merge in float32, one quantization, each layer by itself

Where B is zero the stored codes are already the answer and are copied. The price of the format is the rounding of that
one merge, ‖W_eff − W_export‖ / ‖W_eff‖; it is reported for every layer, and nothing else may differ: before the
directory gets its name it is loaded again with transformers and compared, codes and logits.

Source of the layout: what transformers 5.23 and bitsandbytes 0.50.2 write and read (EXPORT.md of the design).
Departures from them: nothing here runs a bitsandbytes module, and values are quantized from float32, while transformers
quantizes the bf16 values it has loaded.

`pack` makes the tensors of one layer, `writer` the directory, `verify` loads it again, `run` is the journey from a
model or checkpoint to a report; `python -m loqt_ds.export` is the command.
"""

from __future__ import annotations

from loqt_ds.export.report import ExportError, ExportReport, LayerReport
from loqt_ds.export.run import FORMATS, export_checkpoint, export_model
from loqt_ds.export.verify import load_export

__all__ = ["FORMATS", "ExportError", "ExportReport", "LayerReport", "export_checkpoint", "export_model", "load_export"]
