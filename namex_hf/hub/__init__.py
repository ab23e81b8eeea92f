"""Publishing a patched folder on the Hub: what goes up, what is checked first, the push itself."""
