"""`forecache`: the command line. Each command imports what it needs when it runs, so that `--help` is quick."""

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from forecache.cluster.cli import indexer as indexer_commands
from forecache.cluster.cli.command_line import Parser, above_zero, hide_passwords, output_file, positive, ratio
from forecache.cluster.config import add_flags, config_from_args
from forecache.cluster.launch.process_group import run_in_own_session
from forecache.workers.errors import ForecacheError

logger = logging.getLogger("forecache.cluster.cli.main")  # not __name__: this module may run as __main__

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 1 a negative result, 2 an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from forecache.cluster.cli import bench

        return _plainly(lambda: bench.main(arguments[1:]))
    if arguments[:1] == ["eval"]:
        from forecache.cluster.cli import eval as evaluation

        return _plainly(lambda: evaluation.main(arguments[1:]))
    args = _parser().parse_args(arguments)
    command: Command = args.command
    return _plainly(lambda: command(args))


def _plainly(command: Callable[[], int]) -> int:
    """Print our own errors, and those of the operating system, as one line on stderr; any other exception is a bug and
    keeps its traceback."""
    try:
        return command()
    except ForecacheError as error:
        return _refuse(str(error))
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{named}{error.strerror or error}")
    except KeyboardInterrupt:
        return 130


def _refuse(reason: str) -> int:
    print(f"forecache: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="forecache", description="Serve language models over contexts far larger than GPU memory.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start a cluster and serve a model over HTTP")
    add_flags(serve)
    serve.set_defaults(command=_serve)

    doctor = commands.add_parser("doctor", help="check this machine, or with --cluster a running cluster")
    doctor.add_argument(
        "--cluster", action="store_true", help="check that catalog, memory tiers and workers of a running cluster agree"
    )
    doctor.add_argument(
        "--address", default="auto", help="address of its Ray cluster (default: the one on this machine)"
    )
    doctor.set_defaults(command=_doctor)

    top = commands.add_parser("top", help="watch a running cluster: workers, memory tiers, cache hits, throughput")
    top.add_argument(
        "--url", default="http://127.0.0.1:8000", help="URL of the server (default: http://127.0.0.1:8000)"
    )
    top.add_argument("--interval-s", type=above_zero, default=2.0, help="seconds between two readings (default: 2)")
    top.add_argument("--once", action="store_true", help="take two readings, print one table and exit")
    top.set_defaults(command=_top)

    demo = commands.add_parser("demo", help="start a cluster and ask it a question about a long document")
    demo.add_argument("--model", default="smollm2-135m", help="model: built-in name, directory or hub id")
    demo.add_argument("--tokens", type=positive, default=6500, help="length of the document in tokens (default: 6500)")
    demo.add_argument("--keep-ratio", type=ratio, default=0.135, help="resident chunks / all (default: 0.135)")
    demo.set_defaults(command=_demo)

    indexer = commands.add_parser("indexer", help="the Memory Indexer").add_subparsers(required=True, metavar="COMMAND")
    calibrate = indexer.add_parser("calibrate", help="find a model's retrieval heads and write their manifest")
    calibrate.add_argument("--model", required=True, help="built-in name, directory or hub id")
    calibrate.add_argument("--out", required=True, type=output_file, help="file to write")
    calibrate.add_argument("--documents", type=positive, default=96, help="generated documents (default: 96)")
    calibrate.set_defaults(command=_calibrate)
    indexer_commands.register(indexer)

    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="COMMAND")
    new = keys.add_parser("new", help="create a key: prints it once, and the line with its hash for --api-keys-file")
    new.add_argument("--tenant", required=True, help="tenant that the key belongs to; tenants share no cache")
    new.set_defaults(command=_new_key)

    commands.add_parser("bench", help="benchmarks (see `forecache bench --help`)", add_help=False)
    commands.add_parser("eval", help="accuracy on long-context tasks (see `forecache eval --help`)", add_help=False)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=_version)
    return parser


def _serve(args: argparse.Namespace) -> int:
    from forecache.cluster.launch import machine

    hide_passwords()
    config = config_from_args(args)

    def serve() -> int:
        machine.check(config)  # before the imports below, which take seconds
        as_json = config.telemetry.log_format == "json"
        with nullcontext(logger.info) if as_json else _status() as say:
            from forecache.cluster.launch import cluster as serving

            def ready(cluster: serving.Running) -> None:
                say("serving" if as_json else "")
                for sizes in cluster.sizes:
                    logger.info("sizes: %s", sizes) if as_json else print(f"sizes: {sizes}", file=sys.stderr)
                for note in cluster.notes:
                    logger.warning(note) if as_json else print(f"note: {note}", file=sys.stderr)
                print(f"forecache serves {config.model_name} at {cluster.url}/v1", flush=True)

            serving.run(config, say, ready)
        return 0

    return run_in_own_session(lambda: _plainly(serve))


def _doctor(args: argparse.Namespace) -> int:
    if args.cluster:
        from forecache.cluster.cli import integrity

        return integrity.run(args.address)
    from forecache.cluster.cli import doctor

    return doctor.run()


def _top(args: argparse.Namespace) -> int:
    from forecache.cluster.cli import top

    return top.run(args.url, args.interval_s, args.once)


def _demo(args: argparse.Namespace) -> int:
    from forecache.cluster.cli import demo

    return demo.run(args.model, args.tokens, args.keep_ratio)


def _calibrate(args: argparse.Namespace) -> int:
    with _status() as say:
        from forecache.workers.models.loader import model_name, resolve_model
        from forecache.workers.recording.calibrate import calibrate

        path = resolve_model(args.model, say)
        manifest = calibrate(
            path,
            documents=args.documents,
            model_name=model_name(args.model),
            progress=lambda done, documents: say(f"document {done} of {documents}"),
        )
        manifest.save(args.out)
    print(f"{args.out}: {len(manifest.heads)} retrieval heads")
    return 0


def _new_key(args: argparse.Namespace) -> int:
    from forecache.cluster.tenants import entry, new_key

    key, digest = new_key()
    line = entry(digest, args.tenant)
    print(f"the key, which is shown only once: {key}", file=sys.stderr)
    print(line)
    return 0


def _version(args: argparse.Namespace) -> int:
    print(importlib.metadata.version("forecache"))
    return 0


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Show the current activity and its duration; without a terminal, print one line for each activity."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True) if text else None
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("starting")

        def say(text: str) -> None:
            progress.reset(task, description=text, visible=bool(text))

        yield say


if __name__ == "__main__":
    sys.exit(main())
