"""A loaded model and what the engine needs to know of it."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from forecache.workers.decode.attention import ATTENTION_NAME
from forecache.workers.decode.probe import Geometry, inspect_attention, refuse_config
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.layout import ChunkLayout, attention_layout

CONTENT_SAMPLES = 16
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Backbone:
    """``model`` runs with forecache's attention; ``geometry`` are its attention shapes, ``fingerprint`` its weights."""

    model: PreTrainedModel
    path: Path
    fingerprint: str
    geometry: Geometry
    layout: ChunkLayout
    max_model_len: int
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def body_parameters(self) -> int:
        """Weights that every token passes through: all but the embeddings of tokens and the output layer."""
        vocabulary = int(self.config.vocab_size)
        return sum(weight.numel() for weight in self.model.parameters() if vocabulary not in weight.shape)


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


def load_config(path: Path) -> Any:
    """The configuration of a decoder that can be served; raises :class:`UnsupportedModelError` with the reason if not."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{path} has a configuration that transformers can't read: {error}") from error
    refuse_config(config, str(path))
    return config


def load_backbone(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    chunk_tokens: int = 64,
    max_model_len: int | None = None,
) -> Backbone:
    """Load the model at ``path`` and check that its attention can be replaced; see :mod:`.probe`.

    Raises :class:`UnsupportedModelError` with what is in the way.
    """
    config = load_config(path)
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=number,
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.to(device=place)  # type: ignore[call-arg]
    model.requires_grad_(False)
    geometry = inspect_attention(model)
    model.set_attn_implementation(ATTENTION_NAME)
    own_limit = int(config.max_position_embeddings)
    if max_model_len is not None and max_model_len > own_limit:
        raise UnsupportedModelError(
            f"--max-model-len {max_model_len} is more than the {own_limit} positions that {path} was made for."
        )
    fingerprint = weights_fingerprint(path, config)
    layout = attention_layout(
        fingerprint,
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        chunk_tokens=chunk_tokens,
        dtype=number,
    )
    return Backbone(model, path, fingerprint, geometry, layout, max_model_len or own_limit, place, number)


def weights_fingerprint(path: Path, config: Any) -> str:
    """Hex name of what determines K/V: the effective configuration and the weight files.

    A safetensors header has shapes, not values, so two fine-tunes share it: some bytes of each file are read as well.
    """
    digest = blake2b(digest_size=16)
    effective = {k: v for k, v in config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    digest.update(json.dumps(effective, sort_keys=True, default=str).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_bytes))
            for sample in range(CONTENT_SAMPLES):
                stream.seek(max(8 + header_bytes, (size - SAMPLE_BYTES) * (sample + 1) // CONTENT_SAMPLES))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
