"""A tokenizer for encoders, trained from the corpus: BERT's kind, with the special tokens that it masks and joins by.

WordPiece over lower-cased words without accents (Devlin et al., arXiv 1810.04805, section 3; the uncased models), made
by the `tokenizers` library and written as transformers' fast tokenizer. A text becomes [CLS] text [SEP], a pair
[CLS] one [SEP] other [SEP], with token types 0 and 1; [SEP] also separates documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> Any:
    """transformers' tokenizer of at most `vocab_size` tokens; fewer where the text has no more."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    ids = [(token, backend.token_to_id(token)) for token in (SPECIAL["cls_token"], SPECIAL["sep_token"])]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **SPECIAL)
