"""A decoder that attends to what the last encoder layer selected, against one with a mask.

The reference encodes all tokens and decodes with all of them; in the inputs that its decoder is
given, by which it knows padding, what the last layer did not select is padding.
"""

import functools

from helpers import (
    ADAPTER,
    TINY,
    TINY_IMAGES,
    TINY_SPEECH,
    as_on_tpu,
    config,
    encode,
    layer_tokens,
    pack,
    random_frames,
    random_params,
    random_patches,
    random_tokens,
    shift_right,
    with_coda,
    without_loops,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.commands.export import export, program_name
from coda_jax.commands.loading import LoadedModel
from coda_jax.inference import Decoding
from coda_jax.methods import Coda
from coda_jax.methods.coda import Router
from coda_jax.methods.cross_attention import encoding_read, segments_read, tokens_read
from coda_jax.models import param_shapes
from coda_jax.nn import dot_product_attention
from coda_jax.objectives import BestRQ, Generation, Seq2Seq, decoding
from coda_jax.objectives.prefix_tree import prefix_tree
from coda_jax.profiling import flops, timing

BASES = {
    "text": TINY,
    "images": TINY_IMAGES,
    "speech": TINY_SPEECH.replace(num_decoder_layers=1),
}
LENGTH = 12
few = pytest.mark.parametrize(
    "name", [x if x == "text" else pytest.param(x, marks=pytest.mark.all) for x in BASES]
)
every = pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.all) for x in BASES])


def config_of(name="text", **coda):
    """A tiny model that draws no random numbers; K = 5 of 12."""
    coda = {"reduction": 2.5, "cross_attention": "selected", "max_segments": 3, **coda}
    return config(coda, base=BASES[name], dropout_rate=0.0)


def inputs_of(name, rng):
    """Four rows of inputs, the last one padding alone."""
    if name == "images":
        return random_patches(rng, [(3, 4), (2, 3), (1, 1), (0, 0)], LENGTH)
    draw = random_frames if name == "speech" else random_tokens
    return draw(rng, [LENGTH, 7, 1, 0], LENGTH)


def batch_of(inputs, rng, **packing):
    """A batch of inputs and random targets."""
    targets = random_tokens(rng, [5, 3, 1, 0][: len(inputs)], 5)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
        **packing,
    }


class Masked:
    """The network of a config whose decoder attends to all tokens that it does not mask."""

    def __init__(self, cfg):
        self.config = with_coda(cfg, cross_attention="all")
        self.network = self.config.network()
        self.input_mask = self.network.input_mask

    def masked(self, params, inputs, segments=None):
        """The inputs with nothing in the places that the last layer did not select."""
        _, found = encode.__wrapped__(self.config, params, inputs, segments)
        selection = found.get(f"layers_{self.config.num_encoder_layers - 1}")
        if selection is None:
            return inputs
        hit = selection.indices[..., None] == jnp.arange(inputs.shape[1])
        chosen = (hit & selection.valid[..., None]).any(1)
        return jnp.where(chosen.reshape(*chosen.shape, *[1] * (inputs.ndim - 2)), inputs, 0)

    def apply(self, variables, *arguments, method=None, **options):
        """What the network gives; `decode` under the mask."""
        params = variables["params"]
        if method == "decode":
            encoded, inputs, *others = arguments
            segments = options.get("encoder_segment_ids")
            arguments = encoded, self.masked(params, inputs, segments), *others
        if method is not None:
            return self.network.apply(variables, *arguments, method=method, **options)
        inputs, *targets = arguments
        encoded = self.network.apply(
            variables,
            inputs,
            options.get("encoder_segment_ids"),
            enable_dropout=False,
            method="encode",
        )
        options = {name: x for name, x in options.items() if name != "rngs"}
        return self.apply(variables, encoded, inputs, *targets, method="decode", **options)


def with_mask(cfg):
    """The objective around `Masked`."""
    model = Seq2Seq(with_coda(cfg, cross_attention="all"))
    model.module = Masked(cfg)
    return model


def logits_of(model, params, batch):
    """The logits of the real targets; a padding place of a decoder sees anything."""
    found = jax.jit(model.logits)(params, batch)
    return np.asarray(found)[batch["decoder_target_tokens"] > 0]


@few
def test_logits_are_those_with_a_mask(name, rng):
    cfg, batch = config_of(name), batch_of(inputs_of(name, rng), rng)
    params = random_params(cfg)
    expected = logits_of(with_mask(cfg), params, batch)
    np.testing.assert_allclose(logits_of(Seq2Seq(cfg), params, batch), expected, atol=1e-5)


@every
def test_gradients_are_those_with_a_mask(name, branches, rng):
    """Those of the last layer's router, too."""
    del branches
    cfg, batch = config_of(name), batch_of(inputs_of(name, rng), rng)
    found, expected = (
        trees.flatten(jax.jit(jax.grad(lambda p, m=model: m.loss(p, batch)[0]))(random_params(cfg)))
        for model in (Seq2Seq(cfg), with_mask(cfg))
    )
    assert np.abs(found["encoder/layers_1/router/kernel"]).max() > 1e-4
    for path, leaf in found.items():
        atol = 2e-5 * max(1, np.abs(expected[path]).max())
        np.testing.assert_allclose(leaf, expected[path], atol=atol, err_msg=path)


@every
@pytest.mark.parametrize("ids", [(1, 2, 3), (3, 1, 2)], ids=str)
def test_packed_rows_are_those_with_a_mask(name, ids, rng):
    """Each target sees what is selected of its segment, in whatever order these stand."""
    a, b, c = ids
    batch = batch_of(
        inputs_of(name, rng)[:2],
        rng,
        encoder_segment_ids=np.array([[a] * 5 + [b] + [c] * 6, [b] * 7 + [0] * 5]),
        decoder_segment_ids=np.array([[a, a, b, c, c], [b, b, b, 0, 0]]),
    )
    cfg = config_of(name)
    params = random_params(cfg)
    found = logits_of(Seq2Seq(cfg), params, batch)
    np.testing.assert_allclose(found, logits_of(with_mask(cfg), params, batch), atol=1e-5)


@pytest.mark.all
def test_packed_examples_give_what_they_give_alone(rng):
    """Invariant 3."""
    cfg = config_of()
    params, lengths = random_params(cfg), (5, 1, 6)
    alone = batch_of(random_tokens(rng, lengths, 6), rng)
    inputs, targets = alone["encoder_input_tokens"], alone["decoder_target_tokens"]
    expected = logits_of(Seq2Seq(cfg), params, alone)
    packed, segments = pack([x[:n] for x, n in zip(inputs, lengths, strict=True)], 14)
    written = [x[x > 0] for x in targets]
    both, target_segments = pack(written, 10)
    shifted, _ = pack([shift_right(x[None])[0] for x in written], 10)
    batch = batch_of(packed, rng, encoder_segment_ids=segments, decoder_segment_ids=target_segments)
    batch |= {"decoder_input_tokens": shifted, "decoder_target_tokens": both}
    np.testing.assert_allclose(logits_of(Seq2Seq(cfg), params, batch), expected, atol=1e-5)


@pytest.mark.all
@pytest.mark.parametrize(
    "coda",
    [
        {"routing": "sigmoid"},
        {"routing": "truncation"},
        {"routing": "straight_through", "reduction": (4, 1.5)},
        {"attention": "k_to_all", "reduction": (1, 3)},
        {"reduction": 100},
    ],
    ids=str,
)
def test_every_routing_is_that_with_a_mask(coda, rng):
    cfg, batch = config_of(**coda), batch_of(inputs_of("text", rng), rng)
    params = random_params(cfg)
    expected = logits_of(with_mask(cfg), params, batch)
    np.testing.assert_allclose(logits_of(Seq2Seq(cfg), params, batch), expected, atol=1e-5)


@pytest.mark.all
@pytest.mark.parametrize("reduction", [1, (3, 1)], ids=str)
def test_where_the_last_layer_takes_all_tokens_so_does_the_decoder(reduction, rng):
    cfg, batch = config_of(reduction=reduction), batch_of(inputs_of("text", rng), rng)
    params = random_params(cfg)
    expected = logits_of(Seq2Seq(with_coda(cfg, cross_attention="all")), params, batch)
    np.testing.assert_allclose(logits_of(Seq2Seq(cfg), params, batch), expected, atol=1e-6)


def outputs_of(model, params, inputs):
    """(tokens and scores of greedy decoding and of beams, label scores and features)."""
    labels = prefix_tree([(5, 6, 1), (5, 1), (7, 1)], 0)
    generated = [
        model.generate(params, inputs, Generation(max_decode_length=6, num_beams=n)) for n in (1, 3)
    ]
    scored = model.score_targets(params, inputs, labels)
    return generated, (scored.log_probs, scored.decoder)


@every
def test_answers_beams_and_scores_are_those_with_a_mask(name, rng):
    cfg, inputs = config_of(name), inputs_of(name, rng)
    params = random_params(cfg)
    found, expected = (
        jax.jit(functools.partial(outputs_of, model))(params, inputs)
        for model in (Seq2Seq(cfg), with_mask(cfg))
    )
    for (tokens, scores), (their_tokens, their_scores) in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(tokens, their_tokens)
        np.testing.assert_allclose(scores, their_scores, rtol=1e-4, atol=1e-5)
    # Of padding alone a decoder attends to nothing, or the mean of nothing.
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.all
def test_a_tpu_gives_the_same(rng, monkeypatch):
    """Also where the decoder attends to the encoding by matrices."""
    monkeypatch.setattr(dot_product_attention, "_WORTH_A_SOURCE", 0)
    cfg, inputs = config_of(), inputs_of("text", rng)
    params, model = random_params(cfg), Seq2Seq(cfg)
    generation = Generation(max_decode_length=5, num_beams=2)
    expected = jax.jit(lambda p: model.generate(p, inputs, generation))(params)
    with as_on_tpu():
        found = jax.jit(lambda p: model.generate(p, inputs, generation))(params)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.all
def test_an_exported_program_gives_the_same(rng, tmp_path):
    cfg, inputs = config_of(), inputs_of("text", rng)
    params = jax.tree.map(np.asarray, random_params(cfg))
    options = Decoding(max_input_length=LENGTH, max_decode_length=4, batch_size=4)
    export(LoadedModel(cfg, params, None), str(tmp_path / "out"), options)
    program = jax.export.deserialize((tmp_path / "out" / program_name(4, LENGTH)).read_bytes())
    found = program.call([leaf for _, leaf in trees.flatten(params).items()], inputs)
    expected = jax.jit(lambda p: Seq2Seq(cfg).predict(p, inputs, max_decode_length=4))(params)
    np.testing.assert_array_equal(found, expected)


def test_the_cache_holds_keys_and_values_of_the_slots_alone():
    cfg = config_of(reduction=3)
    inputs = jax.ShapeDtypeStruct((2, 100), jnp.int32)

    def cache(params, inputs):
        network = cfg.network()
        encoded = network.apply({"params": params}, inputs, enable_dropout=False, method="encode")
        return decoding.steps(network, params, inputs, encoded)[1](jnp.ones((2, 8), jnp.int32))

    made = trees.flatten(jax.eval_shape(cache, param_shapes(cfg), inputs))
    for kind in ("key", "value"):
        shape = made[f"decoder/layers_0/encoded_{kind}"].shape
        assert shape == (2, cfg.num_heads, 34, cfg.head_dim)
    assert tokens_read(cfg, 100) == 34
    assert tokens_read(with_coda(cfg, cross_attention="all"), 100) == 100
    assert tokens_read(cfg.dense(), 100) == 100


@pytest.mark.all
def test_the_decoders_operations_fall_as_counted_by_hand():
    """Invariant 8, of what is not in a loop: a pass over given targets."""
    wide = TINY.replace(emb_dim=128, num_heads=2, head_dim=64, mlp_dim=256, num_decoder_layers=2)
    sizes = {"batch": 2, "length": 240, "target_length": 16}
    counted, expected = [], []
    for cross_attention in ("all", "selected"):
        cfg = config({"reduction": 3, "cross_attention": cross_attention}, base=wide)
        tokens = jax.ShapeDtypeStruct((2, 240), jnp.int32)
        targets = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        batch = dict(zip(names, (tokens, targets, targets), strict=True))
        with without_loops():
            compiled = jax.jit(Seq2Seq(cfg).logits).lower(param_shapes(cfg), batch).compile()
        counted.append(timing.flops(compiled))
        expected.append(flops.answer_flops(cfg, *sizes.values()))
    difference = expected[0] - expected[1]
    assert difference > 0.1 * expected[1]
    assert counted[0] - counted[1] == pytest.approx(difference, rel=0.05)


@pytest.mark.all
def test_what_is_read_of_an_encoder_alone_is_of_every_token(rng):
    cfg, inputs = config_of("speech"), inputs_of("speech", rng)
    everything = with_coda(cfg, cross_attention="all")
    params = random_params(cfg)
    found, expected = (Seq2Seq(c).encode(params, inputs) for c in (cfg, everything))
    np.testing.assert_array_equal(found, expected)
    batch = {"encoder_input_tokens": inputs}
    model = BestRQ(cfg)
    params = model.add_leaves(params)
    expected = BestRQ(everything).loss(params, batch)[0]
    np.testing.assert_array_equal(model.loss(params, batch)[0], expected)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.all)])
def test_a_segments_tokens_stand_together_and_the_others_do_not_count(packed, rng):
    """Against loops; the segments of the slots follow from the inputs alone."""
    cfg = config_of(reduction=2)
    segments = np.array([[2, 2, 2, 1, 1, 3, 3, 3, 3, 0], [1, 0, 2, 2, 1, 1, 3, 1, 0, 0]])
    ids = segments if packed else None
    tokens = layer_tokens(rng, batch=2, length=10, mask=segments > 0, segment_ids=ids)
    owners = segments if packed else np.ones_like(segments)

    @jax.jit
    def read(tokens, other):
        router = Router(cfg.methods[0], 2)
        selection = router.apply({"params": {"kernel": jnp.ones(4)}}, tokens)
        found = [encoding_read(cfg, x, selection, tokens.segment_ids) for x in (tokens.x, other)]
        return selection, *found, segments_read(cfg, tokens.mask, tokens.segment_ids)

    selection, *_ = read(tokens, tokens.x)
    pairs = zip(np.asarray(selection.indices), np.asarray(selection.valid), strict=True)
    chosen = [set(indices[valid].tolist()) for indices, valid in pairs]
    unselected = np.array([[i not in row for i in range(10)] for row in chosen])
    _, found, changed, of_slots = read(tokens, jnp.where(unselected[..., None], 7.0, tokens.x))
    for row, there in enumerate(chosen):
        order = sorted(there, key=lambda i, row=row: (owners[row, i], i))
        empty = [0] * (of_slots.shape[1] - len(order))
        assert of_slots[row].tolist() == [*owners[row, order], *empty]
        np.testing.assert_array_equal(found[row, : len(order)], tokens.x[row, jnp.array(order)])
    np.testing.assert_array_equal(changed[of_slots > 0], found[of_slots > 0])


@pytest.mark.parametrize("base", [TINY_SPEECH, TINY.encoder_only()], ids=["ctc", "encoder"])
def test_a_model_without_a_decoder_is_refused(base):
    coda = Coda(cross_attention="selected")
    with pytest.raises(ValueError, match=f"cross_attention='selected' .* {base.family!r} has none"):
        base.replace(methods=(coda, ADAPTER))
