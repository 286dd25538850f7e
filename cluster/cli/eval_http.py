"""Evaluation over HTTP: a running server answers, several requests at a time."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from forecache.cluster.http.tenants import authorization
from forecache.workers.errors import ForecacheError, InvalidRequestError
from forecache.workers.evaluation.evaluate import Answer, Column
from forecache.workers.evaluation.ruler import Sample

LONGEST_WAIT_S = 1800.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Takes no proxy that the environment names, as ``top`` and ``bench serve`` take none."""


class HttpBackend:
    """Answers of a forecache server. Prompts go as token ids, so that they are those of an engine in process.

    ``url``: of the server, with or without `/v1`; ``api_key``: where it asks for one; ``concurrency``: requests at a
    time.
    """

    def __init__(self, url: str, *, api_key: str | None, keep_ratio: float, concurrency: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **authorization(api_key)}
        self._keep_ratio = keep_ratio
        self._concurrency = concurrency
        self.model = str(self._ask("/v1/models")["data"][0]["id"])

    def group_size(self, tokens: int) -> int:
        """What the server keeps is not known here; what it is asked at once fits its cold memory."""
        return self._concurrency

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        if column.indexer:
            raise InvalidRequestError(f"the column {column.name} needs an engine of its own: leave out --url")
        with ThreadPoolExecutor(self._concurrency) as threads:
            return list(threads.map(lambda sample: self._answer(sample, column), samples))

    def _answer(self, sample: Sample, column: Column) -> Answer:
        body = {
            "model": self.model,
            "prompt": sample.prompt_token_ids,
            "max_tokens": sample.max_tokens,
            "temperature": 0,
            "seed": 0,
            "forecache": {"policy": column.policy, "keep_ratio": self._keep_ratio},
        }
        found = self._ask("/v1/completions", body)
        usage = found["usage"]
        return Answer(
            text=found["choices"][0]["text"],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            keep_ratio=usage["forecache"]["keep_ratio"],
            coverage=usage["forecache"]["coverage"],
        )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer to a GET, or a POST of ``body``. Raises :class:`ForecacheError` with the server's reason."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with _DIRECT.open(request, timeout=LONGEST_WAIT_S) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise ForecacheError(f"{self._url} refused: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            raise ForecacheError(f"no forecache server answers at {self._url}: {error}") from error
        return answer


def _reason(error: urllib.error.HTTPError) -> str:
    """The message of an OpenAI error object, else the status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return str(error)
