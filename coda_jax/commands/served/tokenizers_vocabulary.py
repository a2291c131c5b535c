"""The vocabulary of tokenizer.json.

pip install tokenizers
"""

import tokenizers

_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # in this order


def load(folder, said):
    """(text -> ids, ids -> text), both without the end marker.

    Args:
        folder: of the file.
        said: what manifest.json says of it.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / said["file"]))
    tokenizer.no_padding()  # to a length that the file says
    tokenizer.no_truncation()
    adds_end = tokenizer.encode("").ids[-1:] == [said["eos_id"]]
    hidden = {None, *said["hidden"]}
    byte_pairs = type(tokenizer.model).__name__ == "BPE"  # whose texts are as they are

    def encode(text):
        return tokenizer.encode(text).ids[: -1 if adds_end else None]

    def decode(ids):
        known = (i if i < said["size"] else said["unk_id"] for i in ids)
        text = tokenizer.decode([i for i in known if i not in hidden], skip_special_tokens=False)
        for written in _CLEANED if said["cleans_up"] and not byte_pairs else ():
            text = text.replace(written, written.strip())
        return text

    return encode, decode
