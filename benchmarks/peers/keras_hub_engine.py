"""keras-hub on JAX. It reads no T5 of Hugging Face, so its variables are set one by one."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from benchmarks.peers.engine import HUGGING_FACE, Case, Engine
from coda_jax import checkpoints


def load(case: Case) -> Engine:
    """T5Seq2SeqLM in float32, with its greedy sampler."""
    config, params = checkpoints.load_hf(case.folder / HUGGING_FACE)
    backbone = keras_hub.models.T5Backbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_encoder_layers,
        num_heads=config.num_heads,
        hidden_dim=config.emb_dim,
        intermediate_dim=config.mlp_dim,
        key_value_dim=config.head_dim,
        dropout=0.0,
        activation=_gelu,
        use_gated_activation=True,
        layer_norm_epsilon=config.layer_norm_epsilon,
        tie_embedding_weights=False,
    )
    model = keras_hub.models.T5Seq2SeqLM(backbone)
    for variable, value in _values(backbone, params):
        variable.assign(np.asarray(value).reshape(variable.shape))
    model.compile(sampler="greedy", jit_compile=True)
    mask = np.ones_like(case.inputs)

    @jax.jit
    def encoder(variables, tokens):
        state = zip(model.variables, variables, strict=True)
        with keras.StatelessScope(state_mapping=state):
            return model.call_encoder(tokens, jnp.ones_like(tokens))

    def encode():
        return np.asarray(encoder([v.value for v in model.variables], case.inputs))

    def generate(length):
        tokens = np.zeros((len(mask), 1 + length), np.int32)
        inputs = {
            "encoder_token_ids": case.inputs,
            "encoder_padding_mask": mask,
            "decoder_token_ids": tokens,
            "decoder_padding_mask": np.arange(1 + length)[None].repeat(len(mask), 0) < 1,
        }
        return np.asarray(model.generate(inputs, stop_token_ids=None)["decoder_token_ids"])[:, 1:]

    return Engine(encode, generate)


def _gelu(x):
    return keras.activations.gelu(x, approximate=True)


def _values(backbone, params: Mapping) -> Iterator[tuple]:
    """The backbone's variables, and our parameter for each."""
    yield backbone.token_embedding.embeddings, params["token_embedder"]["embedding"]
    yield backbone.token_embedding.reverse_embeddings, params["decoder"]["logits_dense"]["kernel"]
    for side in ("encoder", "decoder"):
        stack = params[side]
        layers = getattr(backbone, f"{side}_transformer_layers")
        yield getattr(backbone, f"{side}_layer_norm").weight, stack[f"{side}_norm"]["scale"]
        bias = layers[0].self_attention.relative_attention_bias
        yield bias, stack["relpos_bias"]["rel_embedding"].T
        for number, layer in enumerate(layers):
            ours = stack[f"layers_{number}"]
            own = "attention" if side == "encoder" else "self_attention"
            yield layer.self_attention_layer_norm.weight, ours[f"pre_{own}_layer_norm"]["scale"]
            yield from _attention(layer.self_attention, ours[own])
            if side == "decoder":
                norm = ours["pre_cross_attention_layer_norm"]["scale"]
                yield layer.cross_attention_layer_norm.weight, norm
                yield from _attention(layer.cross_attention, ours["encoder_decoder_attention"])
            yield layer.layer_norm.weight, ours["pre_mlp_layer_norm"]["scale"]
            yield layer.input_projector.kernel, ours["mlp"]["wi_0"]["kernel"]
            yield layer.gate_projector.kernel, ours["mlp"]["wi_1"]["kernel"]
            yield layer.output_projector.kernel, ours["mlp"]["wo"]["kernel"]


def _attention(block, ours: Mapping) -> Iterator[tuple]:
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    for theirs, name in names.items():
        yield getattr(block, f"{theirs}_projector").kernel, ours[name]["kernel"]
