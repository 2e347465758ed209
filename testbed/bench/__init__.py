"""Benchmarks: what a proxy mode costs, measured over modes in turns. Decisions, formats and texts are apart from labs."""
