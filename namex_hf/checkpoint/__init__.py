"""Safetensors in and out, layer by layer; atomic and resumable."""
