"""Our tokenizer against transformers' CLIPTokenizer, built here from the same list of merges."""

import gzip
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest

from helpers import one_line
from libs.common.errors import UsageError
from libs.stable_diffusion import Tokenizer, text

PARTS = ["a photo of", "an astronaut", "riding a horse", "4k", "1girl", "f/1.8", "8K!!!", "(masterpiece:1.2)", "it's",
         "they'LL", "we've", "I'm", "'s", "''", "--", "...", "don't", "x" * 40, "aaaa", "hahahaha", "<lora:x:1>",
         "<|endoftext|>", "<|startoftext|>", "<|", "émigré", "e\u0301", "naïve", "İstanbul", "straße", "ΟΔΟΣ", "ﬁn",
         "日本の写真", "猫", "한국어", "العربية", "हिन्दी", "ไทย", "Ⅷ", "²", "½", "٣", "①", "🐱", "👩‍🚀", "🏳️‍🌈", "🇩🇪", "👍🏽",
         "\u200b", "\u00a0", "\u3000", "\t", "\n", "\r\n", "\x85", "\u2028", "\x1c", "\ufeff", "\x00", "€", "—", "“so”",
         "https://example.org/?q=1&r=2", "snake_case", "CamelCase", "100%", "3,000.50", "C++", "#tag", "@name"]


@pytest.fixture(scope="module")
def ours():
    pytest.importorskip("open_clip")
    return Tokenizer()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tokenizer, from CLIP's list of merges as OpenAI's clip/simple_tokenizer.py numbers it."""
    transformers, open_clip = pytest.importorskip("transformers"), importlib.util.find_spec("open_clip")
    if open_clip is None:
        pytest.skip("no open_clip")
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    with gzip.open(Path(open_clip.origin).with_name("bpe_simple_vocab_16e6.txt.gz")) as f:
        merges = f.read().decode("utf-8").split("\n")[1:49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    names = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    assert len(names) == len(set(names)) == 49408
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda prompts: tokenizer(prompts, padding="max_length", max_length=77, truncation=True,
                                     return_tensors="pt").input_ids


def prompts(n, seed=0):
    """Prompts of many kinds: words, signs, scripts, emoji, any characters at all; empty ones and long ones."""
    rng = random.Random(seed)
    assigned = [chr(c) for c in range(1, 0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    made = ["", " ", "\n", "a" * 1000, "word " * 200, "🐱" * 100]
    while len(made) < n:
        length = rng.choice([1, 3, 10, 30, 60])
        if rng.random() < 0.5:
            made.append(rng.choice([" ", ""]).join(rng.choice(PARTS) for _ in range(length)))
        elif rng.random() < 0.5:
            made.append("".join(rng.choice(assigned) for _ in range(length)))
        else:
            made.append(" ".join("".join(rng.choice("etaoinshrdluETA") for _ in range(rng.randrange(1, 13)))
                                 for _ in range(length)))
    return made


def test_a_thousand_prompts(ours, theirs):
    made = prompts(1000)
    assert sum(ours.surplus(p) > 0 for p in made) > 100  # of them too long
    a, b = ours(made), theirs(made)
    wrong = [p for p, differ in zip(made, (a != b).any(1)) if differ]
    assert a.shape == (1000, 77) and not wrong, wrong[:3]


def test_known_numbers(ours):
    """Those that the papers' code gives for the prompt that everyone tries."""
    row = ours(["a photograph of an astronaut riding a horse"])[0].tolist()
    assert row == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558] + [49407] * 68
    assert ours([""])[0].tolist() == [49406] + [49407] * 76


def test_what_is_too_long_is_cut_and_counted(ours):
    assert ours.surplus("cat " * 75) == 0 and ours.surplus("cat " * 78) == 3
    assert ours(["cat " * 75]).equal(ours(["cat " * 78]))
    row = ours(["dog " * 80])[0]
    assert row[0] == 49406 and row[-1] == 49407 and len(set(row[1:-1].tolist())) == 1


@pytest.mark.parametrize("content, says", [
    (None, "cannot read"), (b"no gzip", "cannot read"), (gzip.compress(b"title\na b\n"), "is not CLIP's"),
    (gzip.compress("title\nein drei wörter\n".encode("latin-1")), "cannot read")])
def test_a_vocabulary_that_is_none(tmp_path, content, says):
    path = tmp_path / "bpe.txt.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        Tokenizer(str(path))
    assert says in one_line(error) and str(path) in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        Tokenizer()
    assert "pip install --no-deps open_clip_torch" in one_line(error)
