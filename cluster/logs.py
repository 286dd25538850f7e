"""Logs of a process: text, or one JSON object a line. Ray keeps what workers, tiers and indexers write in its session's
log folder; what `forecache serve` writes comes to its stderr."""

import json
import logging
import sys
import time
from typing import TextIO

from forecache.cluster.telemetry_config import TelemetryConfig

LOGGER = "forecache"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extra(record: logging.LogRecord) -> dict[str, object]:
    """What came with ``extra``; Ray adds names with an underscore to every record."""
    return {name: value for name, value in vars(record).items() if name not in _OWN and not name.startswith("_")}


class JsonFormatter(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``component``, ``process``, ``message``, what a call gave as ``extra``
    (``request_id`` first of all), and ``exception``."""

    def __init__(self, component: str, process: str) -> None:
        super().__init__()
        self._who = {"component": component, "process": process}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._who,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A line for people; what came as ``extra`` stands behind it."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def format(self, record: logging.LogRecord) -> str:
        head, *trace = super().format(record).split("\n", 1)
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        return "\n".join([head + extra, *trace])


def configure(config: TelemetryConfig, component: str, process: str, stream: TextIO | None = None) -> None:
    """Have forecache's loggers of this process write to ``stream``, stderr by default, and nowhere else."""
    logger = logging.getLogger(LOGGER)
    # not sys.stderr, which Ray Serve puts a logger of its own into
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter(component, process) if config.log_format == "json" else TextFormatter())
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(config.log_level.upper())
