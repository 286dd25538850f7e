"""Incremental detokenization: equal to decoding at once, no split characters, and stop strings work."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forecache.workers.engine.detokenize import Detokenizer
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.tokenizer import eos_token_ids, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve façade, señor!",
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと 다람쥐 헌 쳇바퀴에 타고파",
    "def f(x):\n    return {'a': [x, 1]}\n\n\n\t# 👩‍👩‍👧 🇫🇷 🎉🎉",
]
EOS = "<|end|>"
REPLACEMENT = "�"


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3, Qwen and SmolLM: rare characters take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece as in Llama 2, Mistral and Gemma: "▁" for spaces, the first one stripped, and byte tokens."""
    letters = sorted({letter for line in CORPUS[:2] for letter in line.replace(" ", "▁")})
    pieces = [EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", letter) for letter in letters if letter.isalpha()]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=60),
    st.lists(st.sampled_from([*" \nabcö。狐한👩‍🇫🎉é", " the", "fox ", "fi"]), max_size=40).map("".join),
)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], str, bool]:
    """The text of each token, the rest at the end, and whether a stop string occurred."""
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(token) for token in tokens]
    return pieces, detokenizer.flush(), detokenizer.stopped


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_pieces_make_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = encode(tokenizer, text)
    pieces, rest, stopped = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == decode(tokenizer, tokens)
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)
    assert not stopped


@given(tokens=st.lists(st.integers(0, 329), max_size=60))
def test_pieces_of_any_bytes_make_what_they_decode_to(tokens: list[int]) -> None:
    """Also for tokens that are not valid text, which sampled models write."""
    tokenizer = TOKENIZERS["byte-level"]
    pieces, rest, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == decode(tokenizer, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, data=st.data())
def test_a_stop_string_cuts_where_it_first_is(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = encode(tokenizer, text)
    whole = decode(tokenizer, tokens)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    found = whole[start : start + data.draw(st.integers(1, 5))] or "x"
    stops = (found, data.draw(st.text("abxö🎉 ", min_size=1, max_size=3)))
    # the first token that completes a stop string ends it, also where a longer one would have begun earlier
    steps = [decode(tokenizer, tokens[:count]) for count in range(1, len(tokens) + 1)]
    steps = [step for step in steps if not step.endswith(REPLACEMENT)] + [whole]
    cuts = next(([at for stop in stops if (at := step.find(stop)) >= 0] for step in steps if contains(step, stops)), [])
    pieces, rest, stopped = pieces_of(tokenizer, tokens, stops)
    assert "".join(pieces) + rest == (whole[: min(cuts)] if cuts else whole)
    assert stopped == bool(cuts)


def contains(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop in text for stop in stops)


@given(text=TEXT)
def test_a_stop_string_is_never_begun_in_vain(text: str) -> None:
    """Text that may still become a stop string is held back, exactly that, and is released once it can't."""
    tokenizer = TOKENIZERS["byte-level"]
    stop = "the fox"
    detokenizer, out, tokens = Detokenizer(tokenizer, (stop,)), "", encode(tokenizer, text + " the fo")
    for count, token in enumerate(tokens, 1):
        out += detokenizer.push(token)
        so_far = decode(tokenizer, tokens[:count])
        if stop in so_far:
            assert out == so_far[: so_far.index(stop)]
            break
        held = next(n for n in range(len(stop) - 1, -1, -1) if so_far.endswith(stop[:n]))
        assert REPLACEMENT in so_far or out == so_far[: len(so_far) - held]
    assert detokenizer.stopped == (stop in text + " the fo")


def test_a_character_of_many_tokens_comes_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, rest, _ = pieces_of(tokenizer, encode(tokenizer, "a🎉b"))
    assert [piece for piece in pieces if piece] == ["a", "🎉", "b"]
    assert len(pieces) >= 4
    assert rest == ""


def test_half_a_character_comes_only_with_the_flush(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encode(tokenizer, "a🎉")[:-1]
    pieces, rest, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == "a"
    assert set(rest) == {REPLACEMENT}
    assert "a" + rest == decode(tokenizer, tokens)


def test_a_stop_string_of_many_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "one 狐🎉 two"
    pieces, rest, stopped = pieces_of(tokenizer, encode(tokenizer, text), ("狐🎉",))
    assert "".join(pieces) + rest == "one "
    assert stopped


def test_the_beginning_of_a_stop_string_at_the_end_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, rest, stopped = pieces_of(tokenizer, encode(tokenizer, "give me a STO"), ("STOP", "me too"))
    assert "".join(pieces) == "give me a "
    assert rest == "STO"
    assert not stopped


def test_nothing_comes_after_a_stop_or_a_flush(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, ("b",))
    text = "".join(detokenizer.push(token) for token in encode(tokenizer, "abc"))
    assert (text, detokenizer.stopped) == ("a", True)
    assert [detokenizer.push(token) for token in encode(tokenizer, "def")] == [""] * len(encode(tokenizer, "def"))
    assert detokenizer.flush() == ""

    detokenizer = Detokenizer(tokenizer, ("zz",))
    text = "".join(detokenizer.push(token) for token in encode(tokenizer, "fuz"))
    assert text + detokenizer.flush() == "fuz"
    assert detokenizer.flush() == ""


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    tokens = [end, *encode(tokenizer, "ab c"), end, end, *encode(tokenizer, "d")]
    pieces, rest, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == decode(tokenizer, tokens)
    assert EOS not in "".join(pieces)


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, ("a",))
    assert detokenizer.push(7) == detokenizer.flush() == ""
    assert not detokenizer.stopped


def test_every_end_token_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    config, generation = SimpleNamespace(eos_token_id=5), SimpleNamespace(eos_token_id=[6, 7])
    own = tokenizer.eos_token_id
    assert eos_token_ids(config, generation, tokenizer) == {5, 6, 7, own}
    assert eos_token_ids(SimpleNamespace(eos_token_id=0), None, None) == {0}
    assert eos_token_ids(SimpleNamespace(), SimpleNamespace(eos_token_id=None), None) == frozenset()


@settings(max_examples=20)
@given(text=TEXT)
def test_a_saved_tokenizer_is_loaded_again(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "saved-tokenizer"
    if not path.exists():
        TOKENIZERS["byte-level"].save_pretrained(path)
    tokenizer = load_tokenizer(path)
    assert encode(tokenizer, text) == encode(TOKENIZERS["byte-level"], text)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"model": {"type": "BPE"}}', '{"added_tokens": [], "model": {"type": "x"}}']
)
@pytest.mark.parametrize("model", [True, False])
def test_no_tokenizer_or_a_broken_one_is_refused(
    tiny_model: Path, tmp_path: Path, content: str | None, model: bool
) -> None:
    if model:
        (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UnsupportedModelError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
