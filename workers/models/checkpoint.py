"""Reads the headers of a checkpoint's files before transformers loads them, and refuses checkpoints that don't fit.

transformers initialises missing weights with random numbers and drops unknown ones, so the model would run, but answer
wrongly.
"""

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from forecache.workers.errors import InvalidModelError, UnsupportedModelError, one_line

logger = logging.getLogger(__name__)

WEIGHT_FILES = "*.safetensors"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = "adapter_config.json", "adapter_model.*"
MODELOPT_FILE = "hf_quant_config.json"
"""Older versions of NVIDIA's modelopt write here, and not into config.json, how the weights are quantised."""

_SHARD = re.compile(r"model.*-\d+-of-\d+\.safetensors")
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_WEIGHT = re.compile(r"(\.weight|_proj)$")
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|position_ids)$")
"""Constants that older versions of transformers saved with the weights and now compute."""
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_MTP = re.compile(r"^(model\.)?mtp(\.|_)")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_MTP_PARTS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp_block|mtp_layers)\b")
NAMED = 3
"""Tensors and files that a message names; it counts the others."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it; ``dtype`` in the words of safetensors, such as ``BF16``."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def some(names: Collection[str]) -> str:
    """A few of ``names``, in order, and how many more there are."""
    shown = sorted(names)[:NAMED]
    more = len(names) - len(shown)
    return f"{', '.join(shown)} and {more} more" if more else ", ".join(shown)


def refuse_adapters(path: Path) -> None:
    """Raise :class:`UnsupportedModelError` where a directory holds LoRA or other adapter weights."""
    found = sorted({file.name for pattern in ADAPTER_FILES for file in path.glob(pattern)})
    if not found:
        return
    if (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{path} has adapter files ({some(found)}), which forecache does not apply: merge them into the weights "
            "(peft's merge_and_unload, then save_pretrained), or move them elsewhere to serve the base model."
        )
    raise UnsupportedModelError(
        f"{path} is an adapter ({some(found)}) and not a whole model: merge it into its base model (peft's "
        "merge_and_unload, then save_pretrained) and serve that."
    )


def read_json(file: Path, trouble: str = "can't be loaded") -> dict[str, Any]:
    """The object in a JSON file of a model. Raises :class:`InvalidModelError`: "DIRECTORY TROUBLE: …"."""
    start = f"{file.parent} {trouble}: {file.name}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidModelError(f"{start} can't be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"{start} is not valid JSON ({one_line(error)}). Download it again.") from error
    if not isinstance(content, dict):
        raise InvalidModelError(f"{start} holds no JSON object. Download it again.")
    return content


def weight_files(path: Path) -> list[Path]:
    """The files that transformers reads the weights from.

    Raises :class:`InvalidModelError` where some are missing, or where it is not clear which count.
    """
    stored = {file.name for file in path.glob(WEIGHT_FILES)}
    index = path / INDEX_FILE
    if not index.is_file():
        if SINGLE_FILE in stored:
            return [path / SINGLE_FILE]
        shards = {name for name in stored if _SHARD.fullmatch(name)}
        if shards:
            raise InvalidModelError(
                f"{path} has shards ({some(shards)}) but no file named {INDEX_FILE}, which lists their contents: "
                "download it too."
            )
        raise InvalidModelError(
            f"{path} can't be loaded: there is no file named {SINGLE_FILE} and none named {INDEX_FILE}"
            f"{f', only {some(stored)}' if stored else ''}."
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise InvalidModelError(
            f"{path} can't be loaded: {INDEX_FILE} has no weight_map from tensors to files. Download it again."
        )
    named = set(table.values())
    if outside := {name for name in named if Path(name).name != name}:
        raise InvalidModelError(
            f"{path} can't be loaded: {INDEX_FILE} names files in other directories ({some(outside)})."
        )
    if SINGLE_FILE in stored and named != {SINGLE_FILE}:
        if named & stored:
            raise InvalidModelError(
                f"{path} has its weights twice: {SINGLE_FILE}, and {len(named & stored)} shards that {INDEX_FILE} "
                "names. Remove one of them."
            )
        return [path / SINGLE_FILE]  # the index is left over from an earlier form
    if missing := named - stored:
        raise InvalidModelError(
            f"{path} can't be loaded: {len(missing)} of the {len(named)} weight files that {INDEX_FILE} names are "
            f"missing ({some(missing)}). Download them."
        )
    if left_out := {name for name in stored - named if _SHARD.fullmatch(name)}:
        raise InvalidModelError(
            f"{path} has {len(left_out)} shards that {INDEX_FILE} does not name ({some(left_out)}), so their tensors "
            "would be left out. Download the index that belongs to them, or remove them."
        )
    return [path / name for name in sorted(named)]


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, without their values. Raises :class:`InvalidModelError` for damaged files."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(name)
                    tensors[name] = StoredTensor(file.name, str(part.get_dtype()), tuple(part.get_shape()))
        except Exception as error:  # SafetensorError, OSError; anything that a damaged header leads to
            raise InvalidModelError(
                f"{path} can't be loaded: {file.name} is damaged or incomplete ({one_line(error)}). Download it again."
            ) from error
    return tensors


def quant_method(config: Any) -> str | None:
    """The quantisation method that ``config.json`` names; None without one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method", "without a name")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def check_files(path: Path, config: Any) -> dict[str, StoredTensor]:
    """Check the weight files at ``path`` without loading them; returns their tensors by name.

    Raises:
        InvalidModelError: files are missing, damaged or contradict one another.
        UnsupportedModelError: the weights are quantised in an unsupported way, or the directory also has adapters.
    """
    refuse_adapters(path)
    if (other := getattr(config, "transformers_weights", None)) is not None:
        raise UnsupportedModelError(
            f"{path}: config.json names '{other}' as the weight file (transformers_weights), and forecache reads "
            f"{SINGLE_FILE} or the files that {INDEX_FILE} names. Save the model with save_pretrained."
        )
    method = quant_method(config)
    if method is not None and method != "bitsandbytes" and method not in AUTO_QUANTIZER_MAPPING:
        raise UnsupportedModelError(
            f"{path} is quantised with '{method}', which transformers can't read: serve a checkpoint in bfloat16 or "
            f"float16, or one quantised with one of {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}."
        )
    if method is None and (path / MODELOPT_FILE).is_file():
        raise UnsupportedModelError(
            f"{path} is quantised by modelopt ({MODELOPT_FILE}), which transformers can't read: serve a checkpoint in "
            "bfloat16 or float16."
        )
    tensors = read_headers(path)
    packed = {name: stored.dtype for name, stored in tensors.items() if _is_packed(name, stored)}
    if method is None and packed:
        raise UnsupportedModelError(
            f"{path}: {len(packed)} weights are stored as {some(set(packed.values()))} ({some(packed)}), and "
            "config.json has no quantization_config that says how to read them. Serve a checkpoint in bfloat16 or "
            "float16."
        )
    unscaled = {
        name
        for name, dtype in packed.items()
        if dtype.startswith("F8_E4M3") and not _scales(name, tensors) and _WEIGHT.search(name)
    }
    if unscaled:
        raise InvalidModelError(
            f"{path}: {len(unscaled)} weights are stored as FP8 without their scales ({some(unscaled)}), so their "
            "values are unknown. Download the checkpoint again, or serve one in bfloat16."
        )
    return tensors


def _is_packed(name: str, stored: StoredTensor) -> bool:
    """Whether ``stored`` is not simply a weight's numbers: float8 and float4, or integers in a weight's place."""
    if stored.dtype in _PLAIN_DTYPES:
        return False
    return stored.dtype.startswith(("F8", "F4", "F6")) or _WEIGHT.search(name) is not None


def _scales(name: str, tensors: dict[str, StoredTensor]) -> bool:
    stem = name.removesuffix(".weight")
    known = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight", "_scale_inv", "_scale", ".scale_inv")
    return any(f"{stem}{suffix}" in tensors for suffix in known)


def refuse_unread(path: Path, config: Any, unexpected: Collection[str], tensors: dict[str, StoredTensor]) -> None:
    """Raise :class:`UnsupportedModelError` for tensors of the files that the model does not take.

    Constants of older versions and multi-token-prediction layers, which only speed up decoding, may be left out.
    """
    layers = int(config.num_hidden_layers)
    mtp = {name for name in unexpected if _MTP.match(name)}
    extra_layers = {int(found[1]) for name in unexpected if (found := _LAYER.match(name)) and int(found[1]) >= layers}
    declared = getattr(config, "num_nextn_predict_layers", None) or 0
    for number in extra_layers:
        of_layer = {name for name in unexpected if name.startswith(f"model.layers.{number}.")}
        if number < layers + declared or any(_MTP_PARTS.search(name) for name in of_layer):
            mtp |= of_layer
    unread = {name for name in set(unexpected) - mtp if not _is_constant(name, tensors.get(name))}
    if unread:
        raise UnsupportedModelError(
            f"{path} has {len(unread)} tensors that a '{config.model_type}' of its config.json does not take "
            f"({some(unread)}), so it would be served without them. Serve the checkpoint that this config.json "
            "belongs to."
        )
    if mtp:
        logger.info("%s: %d tensors of multi-token prediction are not used (%s)", path, len(mtp), some(mtp))


def _is_constant(name: str, stored: StoredTensor | None) -> bool:
    if _BUFFERS.search(name):
        return True
    # a triangular matrix of GPT-2 and its like: [1, 1, positions, positions]
    return stored is not None and len(stored.shape) == 4 and _CAUSAL_MASK.search(name) is not None
