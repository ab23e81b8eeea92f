"""Secrets that must not be printed: tokens, and passwords inside addresses."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

HIDDEN = "***"
TOKEN = re.compile(r"\b(?:hf|api)_(?:oauth_|org_|jwt_)?[A-Za-z0-9][A-Za-z0-9.-]{7,}|\b(?:Bearer|Basic) [\w.~+/=-]+")
PASSWORD = re.compile(r"(?<=://)[^\s/]+@")
SIGNED = re.compile(r"(?<=[?&])([\w-]*(?:token|signature|secret|password|credential|policy|key)[\w-]*)=[^&\s]+", re.I)
"""Fields of an address that give access to anyone who has it, as storage behind the Hub uses them."""
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SHORTEST = 6
"""Characters of a password that is hidden outside an address too; a shorter one may be part of any word."""


def scrubbed(text: str) -> str:
    """``text`` without anything that looks like a token, and without the tokens and passwords in use."""
    for secret in sorted(set(_in_use()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return SIGNED.sub(rf"\1={HIDDEN}", PASSWORD.sub(f"{HIDDEN}@", TOKEN.sub(HIDDEN, text)))


def _in_use() -> Iterator[str]:
    from huggingface_hub import constants  # late: every error comes through here, also before anything is imported

    found = [os.environ.get(name, "") for name in TOKENS]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text("utf-8"))
    for name in ADDRESSES:
        address = os.environ.get(name) or os.environ.get(name.lower(), "")
        if login := re.search(r"://(.+)@", address):
            whole, password = login[1], login[1].partition(":")[2]
            found += [whole, password, unquote(password)]
    return (secret.strip() for secret in found if len(secret.strip()) >= SHORTEST)
