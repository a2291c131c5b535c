"""The encoder against the design's equations, written out token by token in float64."""

from helpers import config, encode, random_params, random_tokens, solution
import jax
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax.layers import relative_position_bucket
from coda_jax.routing import num_selected


def numpy_encoder(cfg, params, tokens, segment_ids):
    """The equations of the design, section 2.2, one example and one token at a time, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    encoder = params["encoder"]
    output = np.zeros((*tokens.shape, cfg.emb_dim))

    def norm(x, name, scope=encoder):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scope[name]["scale"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def bias(query, key):
        bucket = relative_position_bucket(
            np.array(key - query), True, cfg.relpos_num_buckets, cfg.relpos_max_distance
        )
        return encoder["relpos_bias"]["rel_embedding"][:, bucket]

    def attention(scope, u, query, keys):
        kernel = {name: scope[name]["kernel"] for name in ("query", "key", "value", "out")}
        heads = []
        for h in range(cfg.num_heads):
            part = slice(h * cfg.head_dim, (h + 1) * cfg.head_dim)
            q = u[query] @ kernel["query"][:, part]
            scores = [q @ (u[j] @ kernel["key"][:, part]) + bias(query, j)[h] for j in keys]
            weights = softmax(scores)
            heads.append(
                sum(
                    w * (u[j] @ kernel["value"][:, part])
                    for w, j in zip(weights, keys, strict=True)
                )
            )
        return np.concatenate(heads) @ kernel["out"]

    def mlp(scope, x):
        hidden = gelu(x @ scope["wi_0"]["kernel"]) * (x @ scope["wi_1"]["kernel"])
        return hidden @ scope["wo"]["kernel"]

    def pick(scope, u, members, reduction):
        """Returns {position: weight} of one example's picked tokens."""
        k = num_selected(len(members), reduction)
        if cfg.coda.routing == "truncation":
            return dict.fromkeys(members[:k], 1.0)
        scores = {i: u[i] @ scope["router"]["kernel"] for i in members}
        if cfg.coda.routing == "sigmoid":
            weights = {i: 1 / (1 + np.exp(-score)) for i, score in scores.items()}
        else:
            values = solution(list(scores.values()), k, cfg.coda.epsilon)
            weights = dict(zip(scores, values, strict=True))
        return {i: weights[i] for i in sorted(members, key=lambda i: -scores[i])[:k]}

    for row, (ids, segments) in enumerate(zip(tokens, segment_ids, strict=True)):
        for segment in set(segments) - {0}:
            members = [i for i in range(len(ids)) if segments[i] == segment]
            x = {i: params["token_embedder"]["embedding"][ids[i]] for i in members}
            for layer, reduction in enumerate(cfg.coda.reductions(cfg.num_encoder_layers)):
                scope = encoder[f"layers_{layer}"]
                u = {i: norm(x[i], "pre_attention_layer_norm", scope) for i in members}
                picked = pick(scope, u, members, reduction)
                keys = members if cfg.coda.attention == "k_to_all" else sorted(picked)
                y = {}
                for i in members:
                    adapter = scope["adapter"]
                    hidden = np.maximum(u[i] @ adapter["wi"]["kernel"], 0)
                    y[i] = x[i] + hidden @ adapter["wo"]["kernel"]
                for i, weight in picked.items():
                    h = x[i] + attention(scope["attention"], u, i, keys)
                    z = h + mlp(scope["mlp"], norm(h, "pre_mlp_layer_norm", scope))
                    y[i] = y[i] + weight * (z - x[i])
                x = y
            for i in members:
                output[row, i] = norm(x[i], "encoder_norm")
    return output


@pytest.mark.parametrize(
    "coda",
    [
        {"reduction": 3},
        {"reduction": (2.5, 4), "attention": "k_to_all", "epsilon": 0.2},
        {"reduction": 2, "routing": "sigmoid"},
        {"reduction": 3, "routing": "truncation", "attention": "k_to_all"},
    ],
    ids=str,
)
def test_encoder_equals_the_equations_token_by_token(coda, rng):
    """Two layers, a packed row, a half-empty one, and distances past the last bucket."""
    cfg = config({"max_segments": 3, **coda})
    params = random_params(cfg, seed=2)
    tokens = random_tokens(rng, [23, 17], 24)
    segment_ids = np.array([[1] * 2 + [2] * 20 + [3] * 1 + [0], [1] * 17 + [0] * 7])
    found, _ = encode(cfg, params, tokens, segment_ids)
    expected = numpy_encoder(cfg, params, tokens, segment_ids)
    inside = segment_ids > 0
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)
