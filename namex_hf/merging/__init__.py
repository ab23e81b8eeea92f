"""Merging: domain vectors, weights, propagation of the base, groups. Knows tensors; knows neither names nor files."""
