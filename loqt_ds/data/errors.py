"""The error every mistake in the user's data ends in: it names the option, its value and the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Data or a tokenizer that cannot be used as asked; the message names option, value and remedy."""
