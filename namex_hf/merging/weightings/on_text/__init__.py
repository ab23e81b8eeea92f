"""Weightings that read `ExpertStatistics`: a recipe with one of them reads calibration text."""
