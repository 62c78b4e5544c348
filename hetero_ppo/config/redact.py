"""Remove secrets from a configuration before it is printed or saved."""

from __future__ import annotations

import re

#: Forms of secrets: a name and password in an address; tokens of Hugging Face, OpenAI, GitHub, AWS and W&B's new form.
SECRETS = (
    re.compile(r"(?<=://)[^\s/:@'\"]+:[^\s/@'\"]+(?=@)"),
    re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}\b"),
    re.compile(r"\bAKIA[A-Z0-9]{16}\b"),
    re.compile(r"\bwandb_v1_[A-Za-z0-9_]{20,}"),
)
REDACTED = "REDACTED"


def redact(text: str) -> str:
    """Return the text with ``REDACTED`` in place of everything that looks like a secret."""
    for pattern in SECRETS:
        text = pattern.sub(REDACTED, text)
    return text
