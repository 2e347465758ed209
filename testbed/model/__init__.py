"""Frozen, typed values that every layer may use. No I/O, and no imports from other folders."""
