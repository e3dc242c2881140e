"""Fixed prompts and noise to scores, for a run and for ``vipo evaluate`` alike."""
