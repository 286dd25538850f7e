"""Logs of a process: text, or one JSON object a line. Ray keeps what workers, tiers and indexers write in its session's
log folder; what `forecache serve` writes comes to its stderr."""

import json
import logging
import sys
import time
from typing import Any, TextIO

from forecache.cluster.config import TelemetryConfig
from forecache.workers.masking import mask_log

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
        if record.exc_info or record.exc_text:
            line["exception"] = record.exc_text or self.formatException(record.exc_info)  # type: ignore[arg-type]
        return json.dumps(_masked(line), ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people; what came as ``extra`` stands behind it."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def format(self, record: logging.LogRecord) -> str:
        head, *trace = super().format(record).split("\n", 1)
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        return mask_log("\n".join([head + extra, *trace]))


def _masked(value: object) -> object:
    """A JSON value without secrets; what JSON has no form of becomes text."""
    if isinstance(value, dict):
        return {str(name): _masked(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return mask_log(str(value))


class _MaskingRecord(logging.LogRecord):
    """A record of any logger, Ray's and Serve's too, that has no secrets in its message and traceback."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        try:
            text = super().getMessage()
        except (TypeError, ValueError, KeyError):
            return  # its own handler reports that the message and its arguments do not fit
        if (masked := mask_log(text)) != text:
            self.msg, self.args = masked, None
        if self.exc_info and self.exc_info[0] is not None:
            trace = logging.Formatter().formatException(self.exc_info)
            if (masked := mask_log(trace)) != trace:
                # a formatter takes the text that is there already
                self.exc_text, self.exc_info = masked, None


def mask_all_records() -> None:
    """From now on no log record of this process, of whatever library, holds a password or a key."""
    logging.setLogRecordFactory(_MaskingRecord)


def configure(config: TelemetryConfig, component: str, process: str, stream: TextIO | None = None) -> None:
    """Have forecache's loggers of this process write to ``stream``, stderr by default, and nowhere else."""
    mask_all_records()
    logger = logging.getLogger(LOGGER)
    # not sys.stderr, which Ray Serve puts a logger of its own into
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter(component, process) if config.log_format == "json" else TextFormatter())
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(config.log_level.upper())
