"""Text without secrets: passwords and keys for logs, addresses and paths as well for clients."""

import re

HIDDEN = "…"

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user and password of a URL: up to the last @, since a password may hold any other character
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s'\"<>]*@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[^\s'\",]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(fc|sk)-[A-Za-z0-9_-]{8,}"), rf"\1-{HIDDEN}"),
    (re.compile(r"(--?api[_-]keys?[_-]file[=\s]+)[^\s'\",)]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(r"\b(api[_-]keys?[_-]file['\"]?\s*[=:]\s*)(?:\w+\()?['\"]?[^\s'\",)]+['\"]?", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"\b((?:password|passwd|requirepass|masterauth|api[_-]?key|secret)['\"]?\s*[=:]\s*)['\"]?[^\s'\",)]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(requirepass\s+)\S+", re.IGNORECASE), rf"\1{HIDDEN}"),
)

_PLACES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]*", re.IGNORECASE), "[address]"),
    (re.compile(r"\[[0-9a-f:]{2,}\]:\d{1,5}", re.IGNORECASE), "[address]"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b"), "[address]"),
    (re.compile(r"\b[A-Za-z][\w-]*(?:\.[\w-]+)*:\d{2,5}\b"), "[address]"),
    # a place in a JSON schema, or in our own API, looks like a path
    (
        re.compile(
            r"(?<![\w.~$/])~?(?!/(?:v1|properties|patternProperties|items|prefixItems|\$defs|definitions|anyOf|allOf|oneOf)\b)"
            r"(?:/[\w.@%+~$-]+)+/?"
        ),
        "[path]",
    ),
)


def mask_secrets(text: str) -> str:
    """``text`` without passwords and keys; who reads logs may see where things are."""
    return _replaced(text, _SECRETS)


def mask_places(text: str) -> str:
    """``text`` without passwords, keys, addresses and paths of files: what a client may see."""
    return _replaced(mask_secrets(text), _PLACES)


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
