"""Documents, tokens, packed batches; every position can be saved and resumed."""
