"""Logs of a process: text, or one JSON object per line. Ray stores the logs of workers, tiers and indexers in the log
directory of its session; `forecache serve` logs to stderr."""

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
    """The ``extra`` of a log call, without the names with an underscore that Ray adds to every record."""
    return {name: value for name, value in vars(record).items() if name not in _OWN and not name.startswith("_")}


class JsonFormatter(logging.Formatter):
    """One JSON object: ``time`` (UTC), ``level``, ``logger``, ``component``, ``process``, ``message``, the ``extra`` of
    the call (such as ``request_id``), and ``exception``."""

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
    """A line of text that ends with the ``extra`` of the call."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def format(self, record: logging.LogRecord) -> str:
        head, *trace = super().format(record).split("\n", 1)
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        return mask_log("\n".join([head + extra, *trace]))


def _masked(value: object) -> object:
    """A JSON value without secrets; other types become text."""
    if isinstance(value, dict):
        return {str(name): _masked(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return mask_log(str(value))


class _MaskingRecord(logging.LogRecord):
    """A record of any logger, also Ray's and Serve's, without secrets in its message and traceback."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        try:
            text = super().getMessage()
        except (TypeError, ValueError, KeyError):
            return  # the handler reports that message and arguments do not fit
        if (masked := mask_log(text)) != text:
            self.msg, self.args = masked, None
        if self.exc_info and self.exc_info[0] is not None:
            trace = logging.Formatter().formatException(self.exc_info)
            if (masked := mask_log(trace)) != trace:
                # formatters use exc_text if it is set
                self.exc_text, self.exc_info = masked, None


def mask_all_records() -> None:
    """Mask passwords and keys in all further log records of this process, of every library."""
    logging.setLogRecordFactory(_MaskingRecord)


def configure(config: TelemetryConfig, component: str, process: str, stream: TextIO | None = None) -> None:
    """Make forecache's loggers of this process write to ``stream`` (default: stderr) and nowhere else."""
    mask_all_records()
    logger = logging.getLogger(LOGGER)
    # not sys.stderr, which Ray Serve replaces by a logger
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter(component, process) if config.log_format == "json" else TextFormatter())
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(config.log_level.upper())
