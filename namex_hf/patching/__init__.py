"""Patching: joins recipe, checkpoint, families and merging, out of core or in memory over a live model."""
