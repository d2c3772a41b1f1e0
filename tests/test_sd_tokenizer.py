"""Our tokenizer beside transformers' CLIPTokenizer, built here from the same list of merges."""

import gzip
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest

from helpers import one_line
from libs.common.errors import UsageError
from libs.stable_diffusion import text

PARTS = ["a photo of", "an astronaut", "riding a horse", "4k", "1girl", "f/1.8", "8K!!!", "(masterpiece:1.2)", "it's",
         "they'LL", "we've", "I'm", "'s", "''", "--", "...", "don't", "x" * 40, "aaaa", "hahahaha", "<lora:x:1>",
         "<|endoftext|>", "<|startoftext|>", "<|", "émigré", "e\u0301", "naïve", "İstanbul", "straße", "ΟΔΟΣ", "ﬁn",
         "日本の写真", "猫", "한국어", "العربية", "हिन्दी", "ไทย", "Ⅷ", "²", "½", "٣", "①", "🐱", "👩‍🚀", "🏳️‍🌈", "🇩🇪", "👍🏽",
         "\u200b", "\u00a0", "\u3000", "\t", "\n", "\r\n", "\x85", "\u2028", "\x1c", "\ufeff", "\x00", "€", "—", "“so”",
         "https://example.org/?q=1&r=2", "snake_case", "CamelCase", "100%", "3,000.50", "C++", "#tag", "@name"]


@pytest.fixture(scope="module")
def ours(open_clip):
    return text.Tokenizer()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tokenizer, from CLIP's list of merges as OpenAI's clip/simple_tokenizer.py numbers it."""
    transformers, open_clip = pytest.importorskip("transformers"), importlib.util.find_spec("open_clip")
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


def random_prompts(n):
    """Prompts of many kinds: words, signs, scripts, emoji, arbitrary characters; empty ones and long ones."""
    rng = random.Random(0)
    assigned = [chr(c) for c in range(1, 0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    prompts = ["", " ", "\n", "a" * 1000, "word " * 200, "🐱" * 100]
    while len(prompts) < n:
        length, kind = rng.choice([1, 3, 10, 30, 60]), rng.choice(["parts", "parts", "characters", "words"])
        if kind == "parts":
            prompts.append(rng.choice([" ", ""]).join(rng.choices(PARTS, k=length)))
        elif kind == "characters":
            prompts.append("".join(rng.choices(assigned, k=length)))
        else:
            prompts.append(" ".join("".join(rng.choices("etaoinshrdluETA", k=rng.randrange(1, 13)))
                                    for _ in range(length)))
    return prompts


def test_a_thousand_prompts(ours, theirs):
    prompts = random_prompts(1000)
    assert sum(ours.surplus(p) > 0 for p in prompts) > 100  # some are too long
    a, b = ours(prompts), theirs(prompts)
    wrong = [p for p, differ in zip(prompts, (a != b).any(1)) if differ]
    assert a.shape == (1000, 77) and not wrong, wrong[:3]


def test_known_numbers(ours):
    """Those of the official code for its example prompt."""
    row = ours(["a photograph of an astronaut riding a horse"])[0].tolist()
    assert row == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558] + [49407] * 68
    assert ours("")[0].tolist() == [49406] + [49407] * 76


def test_long_prompts_are_cut_and_counted(ours):
    assert ours.surplus("cat " * 75) == 0 and ours.surplus("cat " * 78) == 3
    assert ours(["cat " * 75]).equal(ours(["cat " * 78]))


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        text.Tokenizer()
    assert "pip install --no-deps open_clip_torch" in one_line(error)
