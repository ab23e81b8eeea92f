"""Calibration: text of the user's choice as token sequences."""
