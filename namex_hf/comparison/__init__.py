"""Several recipes on one model, side by side: what ``namex-compare`` is made of."""
