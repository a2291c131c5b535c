"""Small tokenizers, and lines in many scripts on which they are compared. Needs Python only."""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import random
import unicodedata

FOLDER = Path(__file__).parent / "golden" / "tokenizers"  # see make_golden_tokenizers.py
NAMES = ("byte_bpe", "byte_bpe_4", "byte_bpe_5", "llama_5", "unigram_4", "unigram_5")

# First characters of scripts and of other things that tokenizers treat apart.
_BLOCKS = {
    "latin": (0x20, 0x7F), "latin 1": (0xA0, 0x100), "extended": (0x100, 0x250),
    "phonetic": (0x250, 0x2B0), "combining": (0x300, 0x370), "greek": (0x370, 0x400),
    "cyrillic": (0x400, 0x500), "armenian": (0x530, 0x590), "hebrew": (0x590, 0x600),
    "arabic": (0x600, 0x700), "devanagari": (0x900, 0x980), "bengali": (0x980, 0xA00),
    "tamil": (0xB80, 0xC00), "thai": (0xE00, 0xE80), "tibetan": (0xF00, 0x1000),
    "georgian": (0x10A0, 0x1100), "jamo": (0x1100, 0x1200), "ethiopic": (0x1200, 0x1380),
    "cherokee": (0x13A0, 0x1400), "khmer": (0x1780, 0x1800), "punctuation": (0x2000, 0x2070),
    "currency": (0x20A0, 0x20D0), "letterlike": (0x2100, 0x2150), "arrows": (0x2190, 0x2200),
    "blocks": (0x2580, 0x2600), "symbols": (0x2600, 0x2700), "kana": (0x3000, 0x3100),
    "han": (0x4E00, 0x5200), "hangul": (0xAC00, 0xAD00), "private": (0xE000, 0xE010),
    "presentation": (0xFB00, 0xFE00), "forms": (0xFF00, 0xFFF0), "gothic": (0x10330, 0x10350),
    "mathematical": (0x1D400, 0x1D500), "emoji": (0x1F300, 0x1F650), "skin": (0x1F3FB, 0x1F400),
    "supplementary han": (0x20000, 0x20100), "tags": (0xE0020, 0xE0080),
    "last": (0x10FFF0, 0x110000),
}  # fmt: skip
_SPACES = (" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u3000", "\u200d",
           "\ufe0f", "\u202e", "\ufeff", "\x00", "\x01", "\x7f", "\x85", "\u2028")  # fmt: skip
_SPECIAL = ("</s>", "<s>", "<pad>", "<unk>", "<mask>", "<extra_id_0>", "<extra_id_3>", "<sep>",
            "<extra_id_99>", "newword", "neues wort", "▁", "Ġ", "<0x0A>", "[CLS]")  # fmt: skip
_FIXED = (
    "", " ", "  ", "\n", "\t\t", " a", "a ", "  a  b  ", "a</s>b<extra_id_3>", "</s>", "a</s>",
    "<extra_id_0><extra_id_1> <extra_id_2>\n<extra_id_3>", "x <sep>y<sep> z", "a newwords newword.",
    "neues wort neues  wort", "e\u0301 é ﬁ ﬀ ½ ① \u212b \u00c5", "ПРИВЕТ привет ёжик", "שָׁלוֹם עולם",
    "السَّلامُ عَلَيْكُم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "こんにちは、世界。", "你好\uff0c世界\uff01",
    "안녕하세요 세계", "👩\u200d👩\u200d👧 👍🏽 🇩🇪", "a\x00b\x01c",
    "1234567890 3.14 1,000 -5 1e-7", "don't I'm she's we've they're isn't", "Hello , world ! ok ?",
    "def f(x):\n    return x + 1\n", "\tif x:\r\n\t\tpass", "https://example.org/?q=a%20b&c=d#e",
    "AbCdEf_GhI snake_case camelCase", "...---!!!???", "<extra_id_", "extra_id_0>", "< s >",
    "ﷺ ﷽", "Ǆ ǅ ǆ ß ẞ İ \u0131", "\u202eabc\u202c", "\ufeffabc", "a\u200bb\u200cc", "Ⅷ ⅷ ㎏ ㌀",
)  # fmt: skip


def edit(file: Path, change: Callable) -> None:
    """Changes what a JSON file holds."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def cleaning_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer that takes spaces away: "it 's ." is "it's."."""
    pieces = ["<pad>", "</s>", "▁hello", "▁", ".", "▁It", "▁'s", "▁is", "▁n't", "▁.", "▁hel"]
    pieces += ["<unk>"]
    model = {"type": "Unigram", "unk_id": 11, "vocab": [[x, -1.0] for x in pieces]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": metaspace, "decoder": metaspace}
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "clean_up_tokenization_spaces": True, **special}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def lines(count: int = 1000) -> list[str]:
    """So many lines; the first 60 are the same in every version of Python.

    Args:
        count: at least 60.
    """
    rng = random.Random(20230411)
    made = list(_FIXED)
    made += ["".join(_written(rng, *block, 12)) for block in _BLOCKS.values()]
    source = [line for line in argparse.__doc__.splitlines() if line]
    while len(made) < count:
        kind = rng.randrange(3)
        if kind == 0:  # one script in words
            block = rng.choice(list(_BLOCKS.values()))
            words = ["".join(_written(rng, *block, rng.randint(1, 9))) for _ in range(6)]
            made.append(rng.choice(_SPACES).join(words))
        elif kind == 1:  # prose with special tokens
            words = rng.choice(source).split(" ")
            words.insert(rng.randint(0, len(words)), rng.choice(_SPECIAL))
            made.append(rng.choice(("", " ")).join(words))
        else:  # all mixed
            parts = [_written(rng, *rng.choice(list(_BLOCKS.values())), 3) for _ in range(4)]
            parts += [[rng.choice(_SPACES)], [rng.choice(_SPECIAL)], [rng.choice(source)[:20]]]
            rng.shuffle(parts)
            made.append("".join(text for part in parts for text in part))
    return made[:count]


def _written(rng: random.Random, first: int, end: int, count: int) -> list[str]:
    """Characters of a block that Unicode has, save surrogates."""
    characters = [chr(rng.randrange(first, end)) for _ in range(count)]
    return [c for c in characters if unicodedata.category(c) != "Cs"]
