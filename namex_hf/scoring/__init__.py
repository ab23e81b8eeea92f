"""Scores of a model: perplexity over text, exact answers by generation."""
