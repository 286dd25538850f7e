"""Removes passwords and keys from texts for logs and clients, and for clients addresses and paths as well.

Clients choose part of these texts, and event loops mask them. So each pattern takes time linear in its text: a match
starts only at the start of a word, or at a mark that the match itself consumes, and no part of a text is read from many
starts.
"""

import re
from collections.abc import Callable

HIDDEN = "…"

CLIENT_CHARS = 2000
"""Longest message for a client. The rest of a longer one would only cost the event loop time."""
LOG_CHARS = 16 << 10
"""Longest text in a log: of a longer one the first half and the last lines stay."""

_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _without_user(match: re.Match[str]) -> str:
    """Remove user and password from a URL: everything from ``://`` up to the last @, since a password may contain any
    other character."""
    _, at, host = match.group().rpartition("@")
    return f"://{HIDDEN}@{host}" if at else match.group()


def _address(match: re.Match[str]) -> str:
    """Hide it unless it is no host: a number, or a single word with a number too small for one of our ports."""
    host, _, port = match.group().rpartition(":")
    if not _LETTER.search(host):
        return match.group()
    if len(port) < 4 and host.replace("_", "").isalpha() and host.lower() != "localhost":
        return match.group()  # such as "line:100"
    return "[address]"


_LETTER = re.compile(r"\b[A-Za-z]")

_SECRETS: tuple[_Rule, ...] = (
    (re.compile(r"://[^\s'\"<>]*"), _without_user),
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

_PLACES: tuple[_Rule, ...] = (
    (re.compile(r"(?<![a-z0-9+.-])[a-z0-9+.-]*+://[^\s'\"<>]*", re.IGNORECASE), "[address]"),
    (re.compile(r"\[[0-9a-f:]{2,}\]:\d{1,5}", re.IGNORECASE), "[address]"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b"), "[address]"),
    (re.compile(r"(?<![\w.-])[\w.-]++:\d{2,5}\b"), _address),
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
    """``text`` without passwords and keys. Addresses stay: readers of logs may see them."""
    return _replaced(text, _SECRETS)


def mask_log(text: str) -> str:
    """:func:`mask_secrets` of at most :data:`LOG_CHARS` of ``text``."""
    if len(text) <= LOG_CHARS:
        return mask_secrets(text)
    head = _whole_words(text[: LOG_CHARS // 2])
    # from the start of a line, since no pattern recognizes half of a secret
    tail = text[-(LOG_CHARS // 4) :].partition("\n")[2]
    left_out = len(text) - len(head) - len(tail)
    return f"{mask_secrets(head)}… ({left_out} characters left out)" + (f"\n{mask_secrets(tail)}" if tail else "")


def mask_places(text: str) -> str:
    """At most :data:`CLIENT_CHARS` of ``text``, without passwords, keys, addresses and paths of files, for clients."""
    if len(text) > CLIENT_CHARS:
        text = f"{_whole_words(text[:CLIENT_CHARS])} {HIDDEN}"
    return _replaced(mask_secrets(text), _PLACES)


def _whole_words(text: str) -> str:
    """``text`` up to its last space: a cut word may be half of a secret, which no pattern would recognize."""
    return text[: max(text.rfind(" "), text.rfind("\n"), 0)]


def _replaced(text: str, rules: tuple[_Rule, ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
