"""Checkpoints that would load wrongly are refused with the tensors' names; every failure to load has a typed error.

All are real files: a tiny model saved by transformers, then changed as people and tools change checkpoints.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Glm4MoeConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.preflight import check_model, check_tokenizer
from forecache.workers.core.config import EngineConfig
from forecache.workers.errors import InvalidModelError, UnsupportedModelError
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.checkpoint import NAMED, some
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Path], object]
WIDTH = 128
FP8_MAX = 448.0
BLOCK = 64


def save(path: Path, config: PreTrainedConfig, **settings: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, **settings)
    return path


def llama(**settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **settings,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid Llama checkpoint of two layers, with a tokenizer."""
    path = save(tmp_path_factory.mktemp("plain"), llama())
    _write_tokenizer(path)
    return path


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def _write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "text": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def tensors(change: Callable[[Tensors], object]) -> Spoil:
    """Change the tensors of the weight file."""

    def spoil(path: Path) -> None:
        loaded = load_file(path / "model.safetensors")
        change(loaded)
        save_file(loaded, path / "model.safetensors", metadata={"format": "pt"})

    return spoil


def settings(**changes: Any) -> Spoil:
    """Change entries of config.json; None removes an entry."""

    def spoil(path: Path) -> None:
        written = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda path: [spoil(path) for spoil in spoils]


def in_shards(path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="100KB")
    (path / "model.safetensors").unlink(missing_ok=True)


def write(name: str, content: str) -> Spoil:
    return lambda path: (path / name).write_text(content)


def quantise(loaded: Tensors, *, scales: str | None, block: int | None = None) -> None:
    """Store linear weights as float8_e4m3fn, with one scale per tensor, or per ``block`` × ``block`` numbers."""
    for name, weight in list(loaded.items()):
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = weight.shape
        high, wide = (rows, columns) if block is None else (block, block)
        tiles = weight.view(rows // high, high, columns // wide, wide)
        scale = tiles.abs().amax(dim=(1, 3)) / FP8_MAX
        loaded[name] = (tiles / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        if scales is not None:
            loaded[name.replace("weight", scales)] = scale if block is not None else scale.view(())


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FINE = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
GATE = "model.layers.1.mlp.gate_proj.weight"
FOUR_BITS = {"bits": 4, "group_size": 128}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}

REFUSED: dict[str, tuple[Spoil, type[Exception], str]] = {
    # values that transformers would take for plain numbers
    "modelopt FP8 that says so": (
        both(tensors(lambda t: quantise(t, scales="weight_scale")), settings(quantization_config=MODELOPT)),
        UnsupportedModelError,
        "quantised with 'modelopt', which transformers can't read",
    ),
    "modelopt FP8 that says so in its own file": (
        both(
            tensors(lambda t: quantise(t, scales="weight_scale")),
            write("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
        ),
        UnsupportedModelError,
        r"quantised by modelopt \(hf_quant_config\.json\)",
    ),
    "FP8 with scales that nothing explains": (
        tensors(lambda t: quantise(t, scales="weight_scale")),
        UnsupportedModelError,
        r"14 weights are stored as F8_E4M3 \(model\.layers\.0\.mlp\.down_proj\.weight, .* and 11 more\)",
    ),
    "FP8 without scales": (
        tensors(lambda t: quantise(t, scales=None)),
        UnsupportedModelError,
        r"14 weights are stored as F8_E4M3 \(.*no quantization_config",
    ),
    "FP8 without scales that says FP8": (
        both(tensors(lambda t: quantise(t, scales=None)), settings(quantization_config=FINE)),
        InvalidModelError,
        r"14 weights are stored as FP8 without their scales \(model\.layers\.0\.mlp\.down_proj\.weight, ",
    ),
    "FP8 without one scale": (
        both(
            tensors(lambda t: quantise(t, scales="weight_scale_inv", block=BLOCK)),
            tensors(lambda t: t.pop(f"{GATE}_scale_inv")),
            settings(quantization_config=FINE),
        ),
        InvalidModelError,
        rf"1 weights are stored as FP8 without their scales \({GATE}\)",
    ),
    "FP8 with scales of another shape": (
        both(
            tensors(lambda t: quantise(t, scales="weight_scale_inv", block=BLOCK)),
            tensors(lambda t: t.update({f"{GATE}_scale_inv": torch.ones(3, 5)})),
            settings(quantization_config=FINE),
        ),
        UnsupportedModelError,
        "can't be loaded: .*quantised with 'fp8'",
    ),
    "integers in a weight's place": (
        tensors(lambda t: t.update({GATE: torch.ones(WIDTH, WIDTH, dtype=torch.int8)})),
        UnsupportedModelError,
        rf"1 weights are stored as I8 \({GATE}\)",
    ),
    # tensors too many, too few, of another shape
    "another layer": (
        tensors(lambda t: t.update({n.replace(".1.", ".2."): w.clone() for n, w in t.items() if ".1." in n})),
        UnsupportedModelError,
        r"9 tensors that a 'llama' of its config\.json does not take \(model\.layers\.2\.input_layernorm\.weight, ",
    ),
    "a bias that the config leaves out": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(WIDTH)})),
        UnsupportedModelError,
        r"1 tensors that .* \(model\.layers\.0\.self_attn\.q_proj\.bias\), so it would be served without them",
    ),
    "a router that the config leaves out": (
        tensors(lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(8, WIDTH)})),
        UnsupportedModelError,
        r"1 tensors that .* \(model\.layers\.0\.mlp\.gate\.weight\)",
    ),
    "LoRA tensors among the weights": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, WIDTH)})),
        UnsupportedModelError,
        r"q_proj\.lora_A\.weight",
    ),
    "no output layer": (
        tensors(lambda t: t.pop("lm_head.weight")),
        InvalidModelError,
        r"1 weights are not in its weight files \(lm_head\.weight\)",
    ),
    "a whole layer missing": (
        tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        InvalidModelError,
        r"9 weights are not in its weight files \(model\.layers\.1\.input_layernorm\.weight, .* and 6 more\)",
    ),
    "a config of other sizes": (
        settings(intermediate_size=64),
        InvalidModelError,
        r"6 weights have another shape than config\.json says \(model\.layers\.0\.mlp\.down_proj\.weight: \[",
    ),
    # files
    "a LoRA adapter beside the weights": (
        both(
            write("adapter_config.json", '{"peft_type": "LORA"}'),
            lambda path: save_file({"lora_A": torch.ones(1)}, path / "adapter_model.safetensors"),
        ),
        UnsupportedModelError,
        r"adapter files \(adapter_config\.json, adapter_model\.safetensors\), which forecache does not apply",
    ),
    "a LoRA adapter alone": (
        both(
            write("adapter_config.json", '{"peft_type": "LORA"}'),
            lambda path: (path / "config.json").unlink(),
        ),
        UnsupportedModelError,
        "is an adapter .*and not a whole model: merge it",
    ),
    "a missing shard": (
        both(in_shards, lambda path: max(path.glob("model-*.safetensors")).unlink()),
        InvalidModelError,
        r"1 of the \d+ weight files that model\.safetensors\.index\.json names are missing \(model-0",
    ),
    "shards without their index": (
        both(in_shards, lambda path: (path / "model.safetensors.index.json").unlink()),
        InvalidModelError,
        r"has shards \(model-0.*but no file named model\.safetensors\.index\.json",
    ),
    "a truncated shard": (
        both(in_shards, lambda path: _cut(max(path.glob("model-*.safetensors")), 50)),
        InvalidModelError,
        r"model-0.*\.safetensors is damaged or incomplete",
    ),
    "a shard that the index leaves out": (
        both(in_shards, lambda path: save_file({"x": torch.ones(1)}, path / "model-00009-of-00009.safetensors")),
        InvalidModelError,
        r"1 shards that .* does not name \(model-00009-of-00009\.safetensors\)",
    ),
    "weights twice": (
        both(in_shards, lambda path: save_file({"x": torch.ones(1)}, path / "model.safetensors")),
        InvalidModelError,
        r"has its weights twice",
    ),
    "an index that is no JSON": (
        both(in_shards, write("model.safetensors.index.json", "{")),
        InvalidModelError,
        r"model\.safetensors\.index\.json is not valid JSON",
    ),
    "an index without a table": (
        both(in_shards, write("model.safetensors.index.json", '{"metadata": {}}')),
        InvalidModelError,
        r"model\.safetensors\.index\.json has no weight_map",
    ),
    "an index that leads elsewhere": (
        both(in_shards, write("model.safetensors.index.json", '{"weight_map": {"x": "../../x.safetensors"}}')),
        InvalidModelError,
        r"names files in other directories \(\.\./\.\./x\.safetensors\)",
    ),
    "a weight file of another name in the config": (
        settings(transformers_weights="other.safetensors"),
        UnsupportedModelError,
        r"names 'other\.safetensors' as the weight file",
    ),
    # configurations
    "a config that is no JSON": (write("config.json", "{"), InvalidModelError, r"config\.json is not valid JSON"),
    "a config without a type": (settings(model_type=None), InvalidModelError, r"config\.json has no model_type"),
    "code of its own": (
        settings(model_type="kimi_k2", auto_map={"AutoConfig": "configuration_kimi.KimiConfig"}),
        UnsupportedModelError,
        "does not know the model_type 'kimi_k2', and forecache does not run the code that comes with a model",
    ),
    "a number that is a word": (settings(hidden_size="wide"), UnsupportedModelError, "transformers can't read"),
    "a config of a wrong kind": (settings(rope_parameters=[1, 2]), UnsupportedModelError, "transformers can't read"),
    # quantisers, whose libraries are not installed or do not run on a CPU
    "awq": (
        settings(quantization_config={"quant_method": "awq"} | FOUR_BITS),
        UnsupportedModelError,
        "gptqmodel.*'awq'",
    ),
    "gptq": (
        settings(quantization_config={"quant_method": "gptq"} | FOUR_BITS),
        UnsupportedModelError,
        "quantised with 'gptq': install what the message names, or serve",
    ),
    "compressed-tensors": (settings(quantization_config=PACKED), UnsupportedModelError, "'compressed-tensors'"),
    "bitsandbytes": (
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        UnsupportedModelError,
        "'bitsandbytes'",
    ),
    "bitsandbytes in 8 bits": (
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        UnsupportedModelError,
        "'bitsandbytes'",
    ),
    "hqq": (settings(quantization_config={"quant_method": "hqq"}), UnsupportedModelError, "'hqq'"),
    "quanto": (
        settings(quantization_config={"quant_method": "quanto", "weights": "int8"}),
        UnsupportedModelError,
        "'quanto'",
    ),
    "torchao": (
        settings(quantization_config={"quant_method": "torchao", "quant_type": "int4_weight_only"}),
        UnsupportedModelError,
        "'torchao'",
    ),
    "fbgemm": (settings(quantization_config={"quant_method": "fbgemm_fp8"}), UnsupportedModelError, "'fbgemm_fp8'"),
    "a quantiser without a name": (settings(quantization_config={"bits": 4}), UnsupportedModelError, "quantised"),
    "a quantiser of another kind": (settings(quantization_config="fp8"), InvalidModelError, "quantization_config"),
    # tokenizers
    "no tokenizer": (
        both(lambda path: (path / "tokenizer.json").unlink(), lambda path: (path / "tokenizer_config.json").unlink()),
        UnsupportedModelError,
        r"has no tokenizer that transformers can load: .*Put the model's tokenizer files",
    ),
    "a tokenizer that is no JSON": (write("tokenizer.json", "{"), UnsupportedModelError, "has no tokenizer that"),
    "an empty tokenizer": (write("tokenizer.json", "{}"), UnsupportedModelError, "has no tokenizer that"),
}


def _cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:-size])


def load(path: Path) -> None:
    """Load the model and its tokenizer as worker and ingress do."""
    load_backbone(resolve_model(str(path)), dtype="bfloat16")
    load_tokenizer(path)


def test_the_sound_checkpoint_loads(plain: Path) -> None:
    load(plain)


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_would_load_wrongly_is_refused(copy: Path, name: str) -> None:
    spoil, kind, reason = REFUSED[name]
    spoil(copy)
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        load(copy)
    said = str(refusal.value)
    assert type(refusal.value) is kind
    assert said.startswith(str(copy))
    assert said.endswith(".")
    assert "\n" not in said  # Serve hands over lines, of which the operator sees one


BEFORE_ANYTHING_STARTS = sorted(
    name
    for name, (_, _, reason) in REFUSED.items()
    if not any(word in reason for word in ("tensors that", "weight files \\(", "another shape", "'fp8'"))
    and name not in ("awq", "gptq", "compressed-tensors", "hqq", "quanto", "torchao", "fbgemm")
    and not name.startswith(("bitsandbytes", "LoRA tensors", "a router"))
)


@pytest.mark.parametrize("name", BEFORE_ANYTHING_STARTS)
def test_what_the_files_alone_tell_is_refused_before_a_cluster_starts(copy: Path, name: str) -> None:
    spoil, kind, reason = REFUSED[name]
    spoil(copy)
    engine = EngineConfig(model=str(copy), device="cpu")
    with pytest.raises(kind, match=reason):
        path = resolve_model(str(copy))
        check_model(path, ServeConfig(engine=engine))
        check_tokenizer(path)


def test_block_scaled_fp8_is_what_its_numbers_and_scales_say(plain: Path, copy: Path) -> None:
    tensors(lambda t: quantise(t, scales="weight_scale_inv", block=BLOCK))(copy)
    settings(quantization_config=FINE)(copy)
    served = load_backbone(copy, dtype="bfloat16").model.state_dict()
    stored = load_file(copy / "model.safetensors")
    for name, weight in load_file(plain / "model.safetensors").items():
        got = served[name].float()
        if name.endswith("_proj.weight"):
            scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            assert torch.equal(got, (stored[name].float() * scale).bfloat16().float())
            assert (got - weight.float()).abs().max() <= weight.float().abs().max() / 16 + 1e-6
        else:
            assert torch.equal(got, weight.bfloat16().float())


def test_serving_a_damaged_checkpoint_ends_with_one_sentence_and_status_2(copy: Path) -> None:
    in_shards(copy)
    shard = max(copy.glob("model-*.safetensors"))
    shard.unlink()
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", str(copy), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--port", "0", "--cold-bytes", "64MiB"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout == ""
    *progress, said = done.stderr.strip().splitlines()
    assert said.startswith(f"forecache: {copy} can't be loaded: ")
    assert shard.name in said
    assert progress == [f"looking for the model {copy}"]


def test_tied_weights_are_no_missing_ones(tmp_path: Path) -> None:
    path = save(tmp_path, llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_backbone(path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tied_weights_that_were_saved_twice_are_no_unexpected_ones(tmp_path: Path) -> None:
    path = save(tmp_path, llama(tie_word_embeddings=True))
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(path)
    load_backbone(path)


def test_constants_that_older_versions_saved_are_left_out(copy: Path) -> None:
    tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))(copy)
    load_backbone(copy)


def test_an_index_left_over_from_shards_is_no_obstacle(plain: Path, copy: Path) -> None:
    in_shards(copy)
    for shard in copy.glob("model-*.safetensors"):
        shard.unlink()
    shutil.copy(plain / "model.safetensors", copy)
    load_backbone(resolve_model(str(copy)))


def test_the_weights_once_more_in_the_vendors_form_are_left_alone(plain: Path, copy: Path) -> None:
    shutil.copy(plain / "model.safetensors", copy / "consolidated.safetensors")
    load_backbone(resolve_model(str(copy)))


def test_layers_of_multi_token_prediction_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GLM-4.5's format: one more layer, with modules that predict the token after the next."""
    config = Glm4MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
    )
    path = save(tmp_path, config)

    def predict(loaded: Tensors) -> None:
        loaded.update({n.replace(".1.", ".2."): w.clone() for n, w in loaded.items() if ".layers.1." in n})
        loaded["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)

    tensors(predict)(path)
    with caplog.at_level(logging.INFO, logger="forecache"):
        load_backbone(path)
    assert "tensors of multi-token prediction are not used (model.layers.2." in caplog.text


def test_a_family_that_makes_an_empty_tokenizer_of_nothing_is_refused(tmp_path: Path) -> None:
    """transformers' Qwen2 tokenizer loads without files, and then turns every text into no tokens."""
    path = save(
        tmp_path,
        Qwen2Config(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        ),
    )  # fmt: skip
    load_config(path)
    with pytest.raises(InvalidModelError, match="its vocabulary is empty"):
        load_tokenizer(path)


def test_messages_name_a_few_and_count_the_rest() -> None:
    assert some({"b", "a"}) == "a, b"
    assert some({f"t{number}" for number in range(NAMED + 4)}) == "t0, t1, t2 and 4 more"
