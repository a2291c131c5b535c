"""Makes small tokenizers of the kinds that T5 models have, and what transformers makes of lines.

Run it from the repository root with transformers 4 first, then with transformers 5, each with
sentencepiece installed:

    PYTHONPATH=tests python tests/golden/make_golden_tokenizers.py

Each writes the folders that end with its number. Both use what the first run trained:
  unigram      spiece.model as of T5, with rules of normalisation and 10 extra ids
  unigram_4/5  it with tokens added later, as transformers 4 and 5 save it
  byte_bpe     vocab.json and merges.txt with the side files of CodeT5
  byte_bpe_4/5 it as transformers 4 and 5 save it
  llama_5      byte pairs with byte fallback and extra ids, as of Pile-T5
and `expected.json` for each: ids of lines, and the texts of those ids up to EOS without padding
and BOS. With `--check` nothing is written, and whatever version runs it compares its own.

Version 5 cannot load `byte_bpe`. It does not use all of what version 4 wrote into tokenizer.json
for T5, so that two lines of `unigram_4` differ.
"""

import argparse
import contextlib
import json
from pathlib import Path
import shutil
import sys
import tempfile

import sentencepiece
from tokenizer_folders import FOLDER, lines
from tokenizers import ByteLevelBPETokenizer
import transformers
from transformers import AutoTokenizer, LlamaTokenizerFast, T5TokenizerFast

VERSION = transformers.__version__.split(".")[0]
COUNT = 60
SENTINELS = [f"<extra_id_{i}>" for i in range(10)]
# In the place of NFKC, whose rules have 240 kB.
RULES = {"\t": " ", "\n": " ", "\u00a0": " ", "\u3000": " ", "ﬁ": "fi", "\u212b": "\u00c5",
         "\uff11": "1"}  # fmt: skip
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
         "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip


def corpus() -> list[str]:
    """English, and some other letters."""
    text = Path(argparse.__file__).read_text().splitlines()[:300]
    return text + ["Größe, élève, naïve: ПРИВЕТ привет, мир! 世界 日本"] * 4


def train_sentencepiece(path: Path, **options) -> None:
    """Writes a SentencePiece model."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=file, num_threads=1, minloglevel=2,
            character_coverage=0.98, **options,
        )  # fmt: skip


def train_unigram(folder: Path) -> None:
    """Writes spiece.model and its settings, as T5's folders have them."""
    folder.mkdir(parents=True)
    rules = folder / "rules.tsv"
    codes = {key: " ".join(f"{ord(c):X}" for c in value) for key, value in RULES.items()}
    rules.write_text("".join(f"{ord(key):X}\t{value}\n" for key, value in codes.items()))
    with contextlib.chdir(folder):  # the model keeps the path of its rules
        train_sentencepiece(
            Path("spiece.model"), model_type="unigram", vocab_size=130, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, normalization_rule_tsv=rules.name,
        )  # fmt: skip
    rules.unlink()
    settings = {"extra_ids": len(SENTINELS), "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def train_byte_bpe(folder: Path) -> None:
    """Writes vocab.json, merges.txt and files such as CodeT5's, whose sentinels strip spaces."""
    folder.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    first = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(corpus(), vocab_size=320, special_tokens=first)
    tokenizer.save_model(str(folder))

    def token(text, lstrip=False):
        return {"content": text, "single_word": False, "lstrip": lstrip, "rstrip": False,
                "normalized": True}  # fmt: skip

    roles = {role: token(text, text == "<mask>") for role, text in ROLES.items()}
    listed = [token(text, lstrip=True) for text in SENTINELS[::-1]]
    first_id = 320
    ids = {text: first_id + i for i, text in enumerate(SENTINELS[::-1])}
    settings = {role: {**fields, "__type": "AddedToken"} for role, fields in roles.items()}
    settings |= {"add_prefix_space": False, "tokenizer_class": "RobertaTokenizer"}
    for name, content in (
        ("special_tokens_map.json", {**roles, "additional_special_tokens": listed}),
        ("added_tokens.json", ids),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def save_unigram(folder: Path) -> None:
    """Writes T5's tokenizer with tokens that were added later."""
    tokenizer = T5TokenizerFast.from_pretrained(FOLDER / "unigram")
    tokenizer.add_tokens(["<sep>"], special_tokens=True)
    tokenizer.add_tokens(["newword", "neues wort"])
    tokenizer.save_pretrained(folder)
    (folder / "spiece.model").unlink(missing_ok=True)


def save_llama(folder: Path) -> None:
    """Writes a tokenizer such as Pile-T5's: it has no padding, and adds EOS only."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        train_sentencepiece(
            source / "tokenizer.model", model_type="bpe", vocab_size=360, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            allow_whitespace_only_pieces=True,
        )  # fmt: skip
        settings = {"add_bos_token": False, "add_eos_token": True, "legacy": False,
                    "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = LlamaTokenizerFast.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": SENTINELS[::-1]})
    tokenizer.save_pretrained(folder)


def load(folder: Path):
    """The tokenizer of a folder."""
    options = {}
    if VERSION == "4":  # it does not understand these of version 5, which are in tokenizer.json
        options = {"extra_special_tokens": {}, "add_bos_token": False, "add_eos_token": True}
    return AutoTokenizer.from_pretrained(folder, **options)


def expected(folder: Path) -> dict:
    """What transformers makes of the lines."""
    tokenizer = load(folder)
    all_ids = [tokenizer(line).input_ids for line in lines(COUNT)]
    texts = []
    for ids in all_ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
        hidden = (tokenizer.pad_token_id, tokenizer.bos_token_id)
        texts.append(tokenizer.decode([i for i in ids if i not in hidden]))
    return {"ids": all_ids, "texts": texts}


def write_expected(name: str) -> None:
    """Writes expected.json, a line of ids or text in a row."""
    found = expected(FOLDER / name)
    rows = {key: ",\n".join(json.dumps(row) for row in value) for key, value in found.items()}
    text = ",\n".join(f'"{key}": [\n{value}\n]' for key, value in rows.items())
    (FOLDER / name / "expected.json").write_text(f"{{\n{text}\n}}\n")


def check() -> int:
    """Compares each folder with what this version makes of it; the number of different lines."""
    count = 0
    for file in sorted(FOLDER.glob("*/expected.json")):
        try:
            found = expected(file.parent)
        except Exception as error:
            print(f"{file.parent.name}: {type(error).__name__}: {error}")
            count += 1
            continue
        wanted = json.loads(file.read_text())
        for key, value in found.items():
            pairs = zip(lines(COUNT), value, wanted[key], strict=True)
            different = [(line, *pair) for line, *pair in pairs if pair[0] != pair[1]]
            print(f"{file.parent.name}: {len(different)} different {key} of {len(value)}")
            for one in different[:3]:
                print("   ", *map(repr, one), sep="\n    ")
            count += len(different)
    return count


def main() -> None:
    """Writes the folders of this version, or checks all."""
    if "--check" in sys.argv:
        sys.exit(min(check(), 1))
    if VERSION == "4":
        shutil.rmtree(FOLDER, ignore_errors=True)
        train_unigram(FOLDER / "unigram")
        train_byte_bpe(FOLDER / "byte_bpe")
        AutoTokenizer.from_pretrained(FOLDER / "byte_bpe").save_pretrained(FOLDER / "byte_bpe_4")
        write_expected("byte_bpe")
    else:
        save_llama(FOLDER / "llama_5")
        write_expected("llama_5")
        four = AutoTokenizer.from_pretrained(FOLDER / "byte_bpe_4")
        four.save_pretrained(FOLDER / "byte_bpe_5")
    save_unigram(FOLDER / f"unigram_{VERSION}")
    for name in ("unigram", "byte_bpe"):
        write_expected(f"{name}_{VERSION}")


if __name__ == "__main__":
    main()
