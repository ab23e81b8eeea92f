"""Publishing a patched folder on the Hub: selection of files, checks, and the push itself."""
