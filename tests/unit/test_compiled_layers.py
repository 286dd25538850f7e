"""Layers through torch.compile: compiled once for all layers and sizes, and computing the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from forecache.workers.errors import ForecacheError, UnsupportedModelError
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.dense.compiled_layers import check_compiled_once, compiled_graphs, decoder_layers

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: steps are compiled only there")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers: more than dynamo's limit for separate compilations."""
    path = tmp_path_factory.mktemp("twelve-layers")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_more_graphs_than_the_first_ones_are_an_error() -> None:
    check_compiled_once(4, 4)
    with pytest.raises(ForecacheError, match=r"3 more graphs .* --torch-compile false"):
        check_compiled_once(4, 7)


def test_the_layers_are_found(model_path: Path) -> None:
    backbone = load_backbone(model_path, dtype="float32", device="cpu")
    layers = decoder_layers(backbone.model, backbone.geometry)
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 12
    with pytest.raises(UnsupportedModelError, match="no list of its 12 layers"):
        decoder_layers(backbone.model.lm_head, backbone.geometry)


@gpu
@no_gpu
def test_serving_compiles_nothing_and_computes_the_same(model_path: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (1, 70, 300, 513)]
    answers = {}
    for compiled in (True, False):
        with LLM(
            str(model_path),
            skip_tokenizer=True,
            dtype="float32",
            device="cuda",
            keep_ratio=1.0,
            hot_bytes=64 << 20,
            cold_bytes=64 << 20,
            torch_compile=compiled,
        ) as llm:
            before = compiled_graphs()
            alone = [llm.generate([prompt], max_tokens=20, ignore_eos=True)[0].token_ids for prompt in prompts]
            together = [answer.token_ids for answer in llm.generate(prompts, max_tokens=20, ignore_eos=True)]
            assert compiled_graphs() == before
            answers[compiled] = alone
            assert together == alone
    assert answers[True] == answers[False]
