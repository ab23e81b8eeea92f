"""Fine-tuning of patched models: data, trainer, bargaining between steps, and the result."""
