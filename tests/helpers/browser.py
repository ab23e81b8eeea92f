"""Pages in a real browser, where the machine has one."""

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser on this machine: {', '.join(BROWSERS)}")


def browse(page: Path, *more: str) -> tuple[str, str]:
    """What the browser made of a page, and what its console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *more]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    ran = subprocess.run(
        [*command, profile, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stdout, "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)
