"""The commands, a file each; `common` is what they share."""
