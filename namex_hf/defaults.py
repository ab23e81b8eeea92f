"""Numbers that the help of the commands states and the rooms go by."""

SMALL_BYTES = 256 << 20
"""A model up to this size is scored, and drawn, without being asked."""
SCORED_TOKENS = 8192
"""Of each held-out text, from its beginning."""
WORD_PROBLEMS = 200
"""That a comparison asks, of each kind."""
KINDS = ("packaged", "arithmetic", "definitions", "code", "copying", "lookup", "chats", "tools")
"""Of problems that a comparison can ask; the first is asked unless others are named."""
PROBLEM_SEEDS = ("tables", "choices")
PROBLEM_SEED = PROBLEM_SEEDS[0]
"""By name, of generated problems."""
PICTURE_TOKENS = 4096
"""Of packaged text that goes through the experts of a small folder whose recipe read none, for its pictures."""
SHARD_SIZE = "5GB"
"""Of shards that are written anew."""
QUANTISERS = ("rtn", "gptq")
"""Of a comparison at equal bytes: round to nearest, and with compensation on calibration text."""
