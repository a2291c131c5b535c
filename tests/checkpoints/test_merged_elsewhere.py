"""What is merged and saved answers the same in transformers and in CTranslate2, live."""

from helpers import GOLDEN, adapted_params, golden_logits
import numpy as np
import pytest

from coda_jax import bundled, checkpoints, methods
from coda_jax.commands.convert import convert
from coda_jax.inference import Decoding, Predictor
from coda_jax.methods import Lora

EVERYTHING = (r"(attention|mlp)/\w+$",)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(3, targets=EVERYTHING),
        Lora(2, targets=EVERYTHING, rank_stabilized=True, weight_decomposed=True),
    ],
    ids=["lora", "dora"],
)
@pytest.mark.parametrize("name", ["v1_1", "v1_0", "mt5"])
def test_a_merged_model_has_the_same_logits_in_transformers(name, lora, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base_config, base = checkpoints.load_hf(GOLDEN / name)
    config = base_config.replace(methods=(lora,))
    params = adapted_params(config, base)
    checkpoints.save_hf(tmp_path, *methods.merge(config, params))
    golden = np.load(GOLDEN / name / "logits.npz")
    ours = golden_logits(config, params, golden)
    encoder = torch.tensor(golden["encoder"], dtype=torch.long)
    with torch.no_grad():
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(
            input_ids=encoder,
            attention_mask=(encoder > 0).long(),
            decoder_input_ids=torch.tensor(golden["decoder_inputs"], dtype=torch.long),
        )
    seen = golden["decoder_targets"] > 0
    np.testing.assert_allclose(ours[seen], theirs.logits.numpy()[seen], rtol=1e-4, atol=1e-4)
    assert np.abs(ours[seen] - golden["logits"][seen]).max() > 0.1  # LoRA does something


def test_a_merged_model_has_the_same_greedy_answers_in_ctranslate2(tmp_path):
    """By its converter, from what `coda convert` writes: the vocabulary lies beside the model."""
    for module in ("torch", "transformers", "sentencepiece"):
        pytest.importorskip(module)
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter
    import transformers

    base_config, base = checkpoints.load_hf(bundled.DENSE)
    config = base_config.replace(methods=(Lora(2, alpha=0.2),))
    params = adapted_params(config, base)
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    convert(str(tmp_path / "adapter"), str(tmp_path / "hf"), "hf", base=str(bundled.DENSE))
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))

    texts = ["def read(path):\n    return path.read_text()", "x = 1", "import os  # a module"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = [tokenizer(text).input_ids for text in texts]
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32")
    found = translator.translate_batch(tokens, beam_size=1, max_decoding_length=12)
    theirs = [tokenizer.convert_tokens_to_ids(row.hypotheses[0]) for row in found]

    assert theirs == answers(config, params, ids)
    assert theirs != answers(base_config, base, ids)


def answers(config, params, ids):
    """Our greedy tokens, up to the end."""
    predictor = Predictor(config, params, decoding=Decoding(max_decode_length=12, num_beams=1))
    found = dict(predictor([np.array(row, np.int32) for row in ids]))
    ends = (config.pad_id, config.eos_id)
    return [[int(x) for x in found[i] if x not in ends] for i in range(len(ids))]
