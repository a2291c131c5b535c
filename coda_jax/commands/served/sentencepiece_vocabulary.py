"""The vocabulary of spiece.model, with the sentinels, which stand behind a space.

pip install 'sentencepiece<0.2.2'
"""

import sentencepiece


def load(folder, said):
    """(text -> ids, ids -> text), both without the end marker.

    Args:
        folder: of the file.
        said: what manifest.json says of it.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / said["file"]))
    size, unknown = len(pieces), pieces.unk_id()
    return pieces.encode, lambda ids: pieces.decode([i if i < size else unknown for i in ids])
