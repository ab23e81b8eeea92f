"""Colours of what is compared, on pages and in pictures."""

COLOURS = ("#2f7fd1", "#e08214", "#159a80", "#b35fbf", "#c9483b", "#8a8d91")
"""Told apart with every kind of colour blindness, on white and on black; lines have their dashes and marks besides."""
