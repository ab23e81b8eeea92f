"""Zero-shot scores by lm-eval's tasks: what ``eval/zero_shot.py`` is made of. Needs the extra ``eval``."""
