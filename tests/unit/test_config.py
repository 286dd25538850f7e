"""Settings from flags and YAML files: flags win, and errors use the names that the user wrote."""

import argparse
from pathlib import Path

import pytest

from forecache.cluster.config import ConfigError, ServeConfig, add_flags, config_from_args, parse_bytes


def parse(*argv: str) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_from_args(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1024", 1024), ("4GiB", 4 << 30), ("512 MB", 512_000_000), ("1.5gib", 3 << 29), ("7b", 7), (12, 12)],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "4 parsecs", "-1GiB", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_defaults_are_those_of_the_models() -> None:
    assert parse() == ServeConfig()


def test_flags_reach_their_sections() -> None:
    config = parse(
        *("--model", "m", "--host", "0.0.0.0", "--port", "9", "--keep-ratio", "0.5", "--window-steps", "32"),
        *("--chunk-tokens", "32", "--hot-bytes", "64MiB", "--cold-bytes", "1GiB", "--workers", "2"),
        *("--redis-url", "redis://r", "--address", "auto", "--indexer-threads", "3", "--threads", "2"),
        *("--sink-chunks", "2", "--policy", "recency"),
    )
    assert (config.engine.model, config.host, config.port, config.workers) == ("m", "0.0.0.0", 9, 2)
    assert (config.engine.keep_ratio, config.engine.window_steps, config.engine.chunk_tokens) == (0.5, 32, 32)
    assert (config.engine.hot_bytes, config.memory.cold_bytes) == (64 << 20, 1 << 30)
    assert (config.redis_url, config.address) == ("redis://r", "auto")
    assert (config.indexer.threads, config.engine.threads, config.selection.sink_chunks) == (3, 2, 2)
    assert config.engine.policy == "recency"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nengine: {keep_ratio: 0.25, hot_bytes: 2GiB}\nmemory: {cold_bytes: 3GiB}\n")
    config = parse("--config", str(file), "--port", "2", "--cold-bytes", "4GiB")
    assert (config.port, config.engine.keep_ratio) == (2, 0.25)
    assert (config.engine.hot_bytes, config.memory.cold_bytes) == (2 << 30, 4 << 30)


def test_an_empty_file_is_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("# nothing yet\n")
    assert parse("--config", str(file)) == ServeConfig()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--keep-ratio", "0"), r"--keep-ratio: .*greater than 0.*got '0'"),
        (("--keep-ratio", "lots"), r"--keep-ratio: .*number.*got 'lots'"),
        (("--port", "70000"), r"--port: .*65535"),
        (("--hot-bytes", "4 parsecs"), r"'4 parsecs' is not a size"),
        (("--object-store-bytes", "1KiB"), r"--object-store-bytes: "),
        (("--indexer-threads", "0"), r"--indexer-threads: "),
    ],
)
def test_a_wrong_flag_is_named(argv: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("engine: {keep_ration: 0.1}", "no setting named engine.keep_ration"),
        ("prot: 1", "no setting named prot"),
        ("- 1", "must hold a mapping"),
        ("port: [", "can't be read"),
        ("engine: 3", "--?engine|engine: "),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        parse("--config", str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_every_setting_has_a_flag_and_a_description() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    sections = {
        name: type(getattr(ServeConfig(), name)).model_fields
        for name in ("engine", "memory", "selection", "indexer", "limits", "resume", "telemetry")
    }
    wanted = {f"{section}.{name}" for section, fields in sections.items() for name in fields}
    wanted |= set(ServeConfig.model_fields) - set(sections) | {"config"}
    assert set(actions) == wanted
    assert all(action.help for action in actions.values())
    assert "%" not in parser.format_help().replace("%%", "")


def test_model_name(tmp_path: Path) -> None:
    for name in ("my-model", "Qwen2.5-0.5B"):
        (tmp_path / name).mkdir()
        assert parse("--model", f"{tmp_path}/{name}/").model_name == name
    assert parse("--model", "org/name").model_name == "org/name"
    assert parse("--model", "org/name", "--served-model-name", "x").model_name == "x"


def test_the_indexers_flags_are_those_of_the_documentation(tmp_path: Path) -> None:
    assert (parse().indexer.checkpoint, parse().indexer.num_indexers) == ("auto", 1)
    config = parse("--indexer", "trained.safetensors", "--num-indexers", "3", "--indexer-deadline-s", "0.5")
    assert (config.indexer.checkpoint, config.indexer.num_indexers) == ("trained.safetensors", 3)
    assert config.indexer.deadline_s == 0.5
    file = tmp_path / "serve.yaml"
    file.write_text("indexer: {checkpoint: none, num_indexers: 2}\n")
    assert parse("--config", str(file)).indexer.checkpoint == "none"
    with pytest.raises(ConfigError, match="--num-indexers"):
        parse("--num-indexers", "0")
