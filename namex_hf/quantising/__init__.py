"""Matrices in few bits: two quantisers, and a checkpoint whose weights are what they leave of it."""
