"""Arithmetic of the method: pure functions on tensors, without modules, ranks or files."""
