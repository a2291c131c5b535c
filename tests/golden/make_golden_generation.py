"""Makes the outputs that transformers' `generate` gives for a tiny random T5 under many options.

Run `python tests/golden/make_golden_generation.py` from the repository root, with transformers 5
installed, to make generation/ again: a checkpoint, and expected.json with inputs and the outputs of
the cases below. The ids of padding, end and start are not T5's, so that a literal would be seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
import torch
import transformers

FOLDER = Path(__file__).parent / "generation"
PAD, EOS, START = 3, 13, 5
CONFIG = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 1,
    "num_decoder_layers": 1, "vocab_size": 24,
}  # fmt: skip
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START}
LENGTHS, NUM_TOKENS, MAX_LENGTH = (9, 4, 7, 2, 8, 5, 9, 3, 6, 1, 9, 7), 9, 10

_BEAMS = {"num_beams": 3, "num_return_sequences": 3}
CASES = {
    "greedy": {},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "repetition penalty": {"repetition_penalty": 1.7},
    "minimum length": {"min_new_tokens": 6},
    "forced first token": {"forced_bos_token_id": 11},
    "prefix": {"decoder_prefix": [9, 14]},
    "all of search": {
        "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5,
        "forced_bos_token_id": 2,
    },
    **{
        f"beams, {penalty}, {stopping}": {
            **_BEAMS, "length_penalty": penalty, "early_stopping": stopping,
        }
        for penalty in (0.5, 1.0, 2.0)
        for stopping in (False, True, "never")
    },
    "beams of a prefix": {
        **_BEAMS, "num_return_sequences": 1, "length_penalty": 1.0, "decoder_prefix": [9, 14],
    },
    "beams with all of search": {
        "num_beams": 4, "num_return_sequences": 2, "length_penalty": 1.5,
        "early_stopping": "never", "no_repeat_ngram_size": 2, "repetition_penalty": 1.3,
        "min_new_tokens": 5, "forced_bos_token_id": 2,
    },
}  # fmt: skip


def write_checkpoint() -> None:
    """Writes config.json and model.safetensors; scales and seed make every option matter."""
    names = transformers.T5ForConditionalGeneration(transformers.T5Config(**CONFIG)).state_dict()
    rng = np.random.default_rng(100)
    weights = {}
    for name, tensor in names.items():
        if "layer_norm" in name:
            value = rng.uniform(0.5, 1.5, tensor.shape)
        elif "relative_attention_bias" in name or name == "shared.weight":
            value = rng.normal(size=tensor.shape)
        else:
            value = rng.normal(size=tensor.shape) * 1.2 * tensor.shape[-1] ** -0.5
        weights[name] = torch.tensor(value, dtype=torch.float32)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del weights[name]
    FOLDER.mkdir(exist_ok=True)
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})
    (FOLDER / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def inputs() -> np.ndarray:
    """Returns the encoder's tokens, none of them padding but behind the end."""
    rng = np.random.default_rng(0)
    others = [token for token in range(CONFIG["vocab_size"]) if token not in (PAD, EOS)]
    tokens = rng.choice(others, (len(LENGTHS), NUM_TOKENS))
    return np.where(np.arange(NUM_TOKENS) < np.array(LENGTHS)[:, None], tokens, PAD)


def outputs(folder: Path, tokens: np.ndarray, options: dict[str, Any], **more) -> tuple[list, list]:
    """Returns transformers' outputs [B][n][<= L], up to the end token, and their scores [B][n].

    The score is that of the search with beams, and the sum of the model's own log-probabilities
    without them.
    """
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokens = torch.tensor(tokens)
    prefix = options.get("decoder_prefix", [])
    given = {name: value for name, value in options.items() if name != "decoder_prefix"}
    beams = given.get("num_beams", 1)
    found = model.generate(
        input_ids=tokens,
        attention_mask=(tokens != PAD).long(),
        decoder_input_ids=torch.tensor([[START, *prefix]] * len(tokens)),
        max_new_tokens=MAX_LENGTH - len(prefix),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **IDS,
        **given,
        **more,
    )
    rows = [_up_to_end(row, len(prefix)) for row in found.sequences[:, 1:].tolist()]
    if beams > 1:
        scores = found.sequences_scores.tolist()
    else:
        log_probs = torch.stack(found.logits, dim=1).log_softmax(-1).numpy()
        scores = [
            float(sum(log_probs[i, j, token] for j, token in enumerate(row[len(prefix) :])))
            for i, row in enumerate(rows)
        ]
    count = options.get("num_return_sequences", 1)
    starts = range(0, len(rows), count)
    return [rows[i : i + count] for i in starts], [scores[i : i + count] for i in starts]


def _up_to_end(row: list[int], start: int) -> list[int]:
    """Returns a row up to its end token, or the longest length."""
    ends = [place for place, token in enumerate(row) if token == EOS and place >= start]
    return row[: ends[0] + 1 if ends else MAX_LENGTH]


def main() -> None:
    """Makes the files, and checks that no option is idle and that some outputs end."""
    write_checkpoint()
    expected, tokens = [], inputs()
    for name, options in CASES.items():
        found, scores = outputs(FOLDER, tokens, options)
        rounded = [[round(score, 6) for score in row] for row in scores]
        expected.append({"case": name, "options": options, "tokens": found, "scores": rounded})
    distinct = {json.dumps(case["tokens"]) for case in expected}
    assert len(distinct) == len(CASES), "some options change nothing"
    lengths = [len(row) for row in (rows[0] for rows in expected[0]["tokens"])]
    assert min(lengths) < MAX_LENGTH == max(lengths), f"all or none end: {lengths}"
    lines = ",\n".join(json.dumps(case) for case in expected)
    ids = {"pad_id": PAD, "eos_id": EOS, "decoder_start_id": START}
    shared = {"ids": ids, "max_decode_length": MAX_LENGTH, "inputs": tokens.tolist()}
    text = json.dumps(shared)[:-1] + f', "cases": [\n{lines}\n]}}\n'
    (FOLDER / "expected.json").write_text(text)


if __name__ == "__main__":
    main()
