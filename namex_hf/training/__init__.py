"""Training: what is learnt while a patched model is fine-tuned, and what becomes of it."""
