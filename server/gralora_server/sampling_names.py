"""Sampling parameters that vLLM's clients call what ours are called."""

REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
