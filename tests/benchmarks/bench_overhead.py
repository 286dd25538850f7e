"""What the framework adds to each streamed token, by stage: a stub engine behind the real cluster and its HTTP.

Usage: python tests/benchmarks/bench_overhead.py [--streams 16] [--tokens 400] [--apart] [--out DIR]

Stages: *engine*, from a token's making to its leaving the worker's coroutine (the engine's thread → the event loop);
*router*, from there to the ingress, through Ray Serve's handle; *HTTP*, from there to the client's socket: the event's
text, the web framework, Serve's proxy. ``--apart`` spreads the streams' tokens over the step; else they all come at
once, as those of a batch do, and the last of them waits for the others.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path

from harness import machine, write_rows
from rich.console import Console
from rich.table import Table
from stream_client import Connection
from stub_worker import TOKENS_PER_S, StampingIngress, StubWorker

from forecache.cluster.config import ServeConfig
from forecache.cluster.serving import running

GOAL_S = 0.002
WARM_UP_TOKENS = 40
"""Left out of every stream: the connections, routes and caches of the first seconds."""
