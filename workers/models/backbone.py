"""A loaded model and what the engine needs to know of it."""

import copy
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forecache.workers.core.config import KvDtype, LoadFormat
from forecache.workers.errors import InvalidModelError, UnsupportedModelError, explained
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.models.checkpoint import (
    WEIGHT_FILES,
    check_files,
    quant_method,
    read_json,
    refuse_unread,
    some,
)
from forecache.workers.models.registry import architecture_of
from forecache.workers.models.step.architecture import Backbone

HASH_BLOCK_BYTES = 1 << 20
ROPE_OF_THE_BATCH = ("longrope", "dynamic")
"""RoPE kinds whose frequencies depend on the longest position of the forward pass: K in the cache would change."""
DUMMY_GAIN = 0.5
"""Size of a dummy linear layer's output to its input."""


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on CPU, where half precision is slow, and bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def kv_number(kv_dtype: KvDtype, dtype: torch.dtype) -> torch.dtype:
    """What K/V are kept in, in the hot pool of a model in ``dtype``."""
    return torch.float8_e4m3fn if kv_dtype == "fp8" else dtype


def expected_layout(config: Any, *, chunk_tokens: int, dtype: torch.dtype) -> ChunkLayout:
    """The chunks of a model with this configuration, before its weights are known; K/V are stored in ``dtype``."""
    return architecture_of(config.model_type).chunk_layout(config, chunk_tokens=chunk_tokens, dtype=dtype)


def expected_weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model with this configuration, if all are kept in ``dtype``."""
    with explained(str(config.model_type), "can't be built"), torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-untyped-call]
    return sum(int(weight.numel()) for weight in model.parameters()) * dtype.itemsize


def load_config(path: Path) -> Any:
    """The configuration of a decoder that can be served; or :class:`UnsupportedModelError` with the reason."""
    unreadable = "has a configuration that transformers can't read"
    written = read_json(path / "config.json", unreadable)
    model_type = written.get("model_type")
    if not isinstance(model_type, str):
        raise InvalidModelError(f"{path} {unreadable}: config.json has no model_type. Download it again.")
    if model_type not in CONFIG_MAPPING:
        code = "auto_map" in written
        raise UnsupportedModelError(
            f"{path} {unreadable}: the installed transformers does not know the model_type '{model_type}'"
            + (", and forecache does not run the code that comes with a model (auto_map). " if code else ". ")
            + "Serve a model of a type that it knows, or install a transformers that knows this one."
        )
    if not isinstance(written.get("quantization_config", {}), dict):
        raise InvalidModelError(f"{path} {unreadable}: its quantization_config is no object. Download it again.")
    with explained(path, unreadable):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    refuse_config(config, str(path))
    return config


def refuse_config(config: Any, name: str) -> None:
    """Raise :class:`UnsupportedModelError` for what the configuration alone tells."""
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(f"{name} is of type '{config.model_type}', which is not a decoder language model.")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{name} is of type '{config.model_type}', which is not for text alone.")
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in ROPE_OF_THE_BATCH:
            raise UnsupportedModelError(
                f"{name} uses '{kind}' RoPE, whose frequencies change with the length of the batch, so that cached "
                "keys would not be those of a later step. Set a fixed kind (for example yarn) in its config.json."
            )
    architecture_of(config.model_type).refuse(config, name)
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise UnsupportedModelError(
            f"{name} is of type '{config.model_type}', whose configuration gives no max_position_embeddings: forecache "
            "must know how long a context it was made for."
        )


def _rope_types(parameters: Any) -> list[str]:
    """``rope_type`` of a flat dict, or of each entry of a dict per layer kind."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [entry["rope_type"] for entry in parameters.values() if isinstance(entry, dict) and "rope_type" in entry]


def load_backbone(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    chunk_tokens: int = 64,
    max_model_len: int | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    kv_dtype: KvDtype = "auto",
) -> Backbone:
    """Load the model at ``path`` and check that its attention can be replaced; see :mod:`.dense.probe`.

    ``load_format`` "dummy" reads only the configuration there and draws the weights from ``seed``. Chunks hold K/V in
    ``dtype``, or with ``kv_dtype`` "fp8" in float8_e4m3fn.

    Raises :class:`UnsupportedModelError` with the reason if the model can't be served.
    """
    config = load_config(path)
    own_limit = int(config.max_position_embeddings)
    if max_model_len is not None and max_model_len > own_limit:
        raise UnsupportedModelError(
            f"--max-model-len {max_model_len} is more than the {own_limit} positions that {path} was made for."
        )
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    if load_format == "dummy":
        model = _dummy_model(path, config, number, place, seed)
    else:
        model = _load_model(path, config, number)
        with explained(path, f"can't be put on {place}", "Use a smaller model, or another --device."):
            model.to(device=place)  # type: ignore[call-arg]
    model.requires_grad_(False)
    if load_format == "dummy":
        fingerprint = dummy_fingerprint(config, number, place, seed)
    else:
        fingerprint = weights_fingerprint(path, config)
    limit = max_model_len or own_limit
    architecture = architecture_of(config.model_type)
    if kv_dtype != "auto" and not architecture.plain_kv:
        raise UnsupportedModelError(f"--kv-dtype {kv_dtype} is for plain K/V, and {path} keeps none; use auto.")
    geometry = architecture.replace_attention(model, path)
    stored = kv_number(kv_dtype, number)
    layers = architecture.layers(config, chunk_tokens=chunk_tokens, dtype=stored, geometry=geometry)
    layout = architecture.chunk_layout(
        config, chunk_tokens=chunk_tokens, dtype=stored, fingerprint=fingerprint, geometry=geometry
    )
    return Backbone(architecture, model, path, fingerprint, geometry, layers, layout, limit, place, number)


def _load_model(path: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on CPU. transformers makes up weights that it does not find in the files and drops those that it does
    not know; here both are errors."""
    tensors = check_files(path, config)
    architecture_of(config.model_type).refuse_tensors(path, {name: stored.file for name, stored in tensors.items()})
    method = quant_method(config)
    advice = (
        "Check its files and download them again."
        if method is None
        else f"It is quantised with '{method}': install what the message names, or serve a checkpoint of the model in "
        "bfloat16 or float16."
    )
    with explained(path, "can't be loaded", advice):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="eager",  # the one that every model has; the probe exchanges it
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
            output_loading_info=True,
        )
    model, info = loaded
    if missing := info["missing_keys"]:
        raise InvalidModelError(
            f"{path}: {len(missing)} weights are not in its weight files ({some(missing)}). Download the files again, "
            "or the config.json that belongs to them."
        )
    if info["mismatched_keys"]:
        shapes = {f"{key[0]}: {list(key[1])}, not {list(key[2])}" for key in info["mismatched_keys"]}
        raise InvalidModelError(
            f"{path}: {len(shapes)} weights have another shape than config.json says ({some(shapes)}). Serve the "
            "config.json that belongs to them."
        )
    if info["error_msgs"]:
        raise InvalidModelError(f"{path} can't be loaded: {'; '.join(info['error_msgs'])}.")
    refuse_unread(path, config, info["unexpected_keys"], tensors)
    assert isinstance(model, PreTrainedModel)
    if method is not None:
        _unify_dtype(model, dtype)
    return model


def _unify_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights that transformers dequantised come in the dtype of their scales: have them in ``dtype``."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype == dtype:
            continue
        if "scale" not in name and not any(part in name for part in kept):
            weight.data = weight.data.to(dtype)


def _dummy_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """Random weights, made on ``device`` itself: as transformers would begin a training, but for the linear layers.

    Those are drawn so that their outputs are half as large as their inputs, whatever the width. With a fixed
    ``initializer_range`` wide models amplify rounding from layer to layer, until no two kernels agree.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        with explained(path, "can't be built"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")  # type: ignore[no-untyped-call]
        tied = model.get_input_embeddings().weight
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not tied:
                torch.nn.init.normal_(module.weight, std=DUMMY_GAIN * module.in_features**-0.5)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def weights_fingerprint(path: Path, config: Any) -> str:
    """Hex name of what determines K/V: the effective configuration and every byte of the weight files.

    Headers or samples would not do: a fine-tune may differ from its base in one layer, or in one embedding. The files
    have just been loaded, so they are read from the page cache.
    """
    digest = _config_digest(config)
    for file in sorted(path.glob(WEIGHT_FILES)):
        content = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                content.update(block)
        digest.update(f"{file.name}:{content.hexdigest()}".encode())
    return digest.hexdigest()


def dummy_fingerprint(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> str:
    """Name of random weights: ``dummy-`` and a digest of everything that determines them, the device type included."""
    digest = _config_digest(config)
    digest.update(repr((str(dtype), device.type, seed, torch.__version__)).encode())
    return f"dummy-{digest.hexdigest()}"


def _config_digest(config: Any) -> blake2b:
    digest = blake2b(digest_size=16)
    effective = {k: v for k, v in config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    digest.update(json.dumps(effective, sort_keys=True, default=str).encode())
    return digest
