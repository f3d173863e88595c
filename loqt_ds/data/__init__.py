"""Documents, tokens, packed batches; every position can be saved and resumed."""

from loqt_ds.data.batches import TrainBatches, ValidationSet
from loqt_ds.data.build import DataBundle, build_data
from loqt_ds.data.errors import DataError
from loqt_ds.data.prefetch import StepBatches
from loqt_ds.data.tokenizer import Tokenizer, load_or_train_tokenizer, load_tokenizer

__all__ = [
    "DataBundle",
    "DataError",
    "StepBatches",
    "Tokenizer",
    "TrainBatches",
    "ValidationSet",
    "build_data",
    "load_or_train_tokenizer",
    "load_tokenizer",
]
