"""Training: what is learnt while a patched model is fine-tuned."""
