"""CLIP's tokenizer and text encoder: Radford et al. 2021 (arXiv 2103.00020), the text half of ViT-L/14.

The encoder's modules have the names of transformers' CLIPTextModel, which are those in an SD 1.x checkpoint.
"""

import gzip
import importlib.util
import os
import re
import unicodedata

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UsageError

LENGTH = 77  # tokens of a prompt, including its start and end
VOCABULARY = 49408


# ---- the tokenizer: byte pair encoding, Sennrich et al. 2016 (arXiv 1508.07909)

def read_merges():
    """CLIP's 48,894 pairs, the most frequent first, from a file of the package open_clip_torch (not imported)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise UsageError("CLIP's vocabulary is missing; `pip install --no-deps open_clip_torch` installs it")
    path = os.path.join(os.path.dirname(spec.origin), "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    return [tuple(line.split()) for line in lines[1:VOCABULARY - 512 - 2 + 1]]  # a title, then more pairs than CLIP uses


def byte_symbols():
    """{byte: printable character}: its own if it has one, else one from number 256 on; in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


SPECIAL = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
KINDS = re.compile(r"L+|N|P+")  # a run of letters, one number, a run of other signs


def kind(char):
    """By its Unicode category: "L" for a letter, "N" for a number, " " for a space, "P" for anything else."""
    if char in "\t\n\v\f\r \x85" or unicodedata.category(char) in ("Zs", "Zl", "Zp"):
        return " "
    first = unicodedata.category(char)[0]
    return first if first in "LN" else "P"


def split_words(text):
    """The words of a prompt: runs of letters, single numbers, runs of other signs, and contractions such as 's or 'll.

    Normalised as in transformers' CLIPTokenizer: composed characters (NFC), lower case, nothing else.
    """
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))  # one by one: no final sigma
    kinds, words, i = "".join(map(kind, text)), [], 0
    while i < len(text):
        found = CONTRACTION.match(text, i) or KINDS.match(kinds, i)
        end = found.end() if found else i + 1
        if found:
            words.append(text[i:end])
        i = end
    return words


class Tokenizer:
    """Prompts -> token numbers, B x 77: start, at most 75 tokens, end, and more ends up to the length."""

    def __init__(self):
        merges = read_merges()
        self.bytes = byte_symbols()
        symbols = list(self.bytes.values())
        names = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.ids = {name: i for i, name in enumerate(names)}
        self.start, self.end = len(names), len(names) + 1

    def encode_word(self, word):
        """Token numbers of one word: starting from its bytes, the most frequent pair is merged again and again."""
        parts = [self.bytes[b] for b in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                is_pair = tuple(parts[i:i + 2]) == pair
                merged.append("".join(pair) if is_pair else parts[i])
                i += 1 + is_pair
            parts = merged
        return tuple(self.ids[p] for p in parts)

    def encode(self, prompt):
        """All token numbers of a prompt, without its start and its end."""
        ids = []
        for part in SPECIAL.split(prompt):
            if SPECIAL.fullmatch(part):
                ids.append(self.start if "start" in part else self.end)
            else:
                ids += [i for word in split_words(part) for i in self.encode_word(word)]
        return ids

    def __call__(self, prompts):
        """List of B texts, or one text -> B x 77, long. Long prompts are cut off; `surplus` says by how much."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [[self.start, *self.encode(p)[:LENGTH - 2], self.end] for p in prompts]
        return torch.tensor([row + [self.end] * (LENGTH - len(row)) for row in rows])

    def surplus(self, prompt):
        """The number of tokens of a prompt that do not fit."""
        return max(0, len(self.encode(prompt)) - (LENGTH - 2))


# ---- the encoder

class TextAttention(nn.Module):
    """Causal self-attention: a token sees itself and those before it. B x L x C -> the same shape."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class TextLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), TextAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))  # CLIP's "quick" GELU


class TextEncoder(nn.Module):
    """Token numbers B x L -> B x L x width, after the last norm; the defaults are CLIP ViT-L/14's, 123,060,480
    parameters."""

    def __init__(self, width=768, layers=12, heads=12):
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(VOCABULARY, width),
                                         "position_embedding": nn.Embedding(LENGTH, width)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(width, heads) for _ in range(layers))})
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids):
        positions = self.embeddings["position_embedding"].weight[:ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + positions
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)
