"""Commands that stand beside `namex-patch`, a file each."""
