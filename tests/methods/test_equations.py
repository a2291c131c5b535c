"""The encoder against the equations of docs/method.md, written out token by token in float64."""

from helpers import config, encode, gelu, method_of, random_params, random_tokens, solution
import jax
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax.methods import Coda
from coda_jax.methods.selection import num_selected
from coda_jax.nn.position_bias import relative_position_bucket


class NumpyEncoder:
    """The equations of docs/method.md, one example and one token at a time, in float64.

    `members` are the positions of one example; {position: vector} stands for its tokens.
    """

    def __init__(self, cfg, params):
        self.cfg, self.coda = cfg, method_of(cfg, Coda)
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.encoder = self.params["encoder"]

    def __call__(self, tokens, segment_ids):
        output = np.zeros((*tokens.shape, self.cfg.emb_dim))
        for row, (ids, segments) in enumerate(zip(tokens, segment_ids, strict=True)):
            for segment in set(segments) - {0}:
                members = [i for i in range(len(ids)) if segments[i] == segment]
                x = {i: self.params["token_embedder"]["embedding"][ids[i]] for i in members}
                for i, y in self.encode(x, members).items():
                    output[row, i] = y
        return output

    def encode(self, x, members):
        """All layers, and the norm behind them."""
        for layer, reduction in enumerate(self.coda.reductions(self.cfg.num_encoder_layers)):
            x = self.layer(self.encoder[f"layers_{layer}"], x, members, reduction)
        return {i: norm(x[i], self.encoder["encoder_norm"]) for i in members}

    def layer(self, scope, x, members, reduction):
        """y = x + adapter(u), and for the picked tokens plus weight * (frozen layer(x) - x)."""
        u = {i: norm(x[i], scope["pre_attention_layer_norm"]) for i in members}
        picked = self.pick(scope, u, members, reduction)
        keys = members if self.coda.attention == "k_to_all" else sorted(picked)
        down, up = (scope["adapter"][name]["kernel"] for name in ("wi", "wo"))
        y = {i: x[i] + np.maximum(u[i] @ down, 0) @ up for i in members}
        for i, weight in picked.items():
            h = x[i] + self.attention(scope["attention"], u, i, keys)
            z = h + mlp(scope["mlp"], norm(h, scope["pre_mlp_layer_norm"]))
            y[i] = y[i] + weight * (z - x[i])
        return y

    def pick(self, scope, u, members, reduction):
        """Returns {position: weight} of one example's picked tokens."""
        k = num_selected(len(members), reduction)
        if self.coda.routing == "truncation":
            return dict.fromkeys(members[:k], 1.0)
        scores = {i: u[i] @ scope["router"]["kernel"] for i in members}
        if self.coda.routing == "sigmoid":
            weights = {i: 1 / (1 + np.exp(-score)) for i, score in scores.items()}
        else:
            values = solution(list(scores.values()), k, self.coda.epsilon)
            weights = dict(zip(scores, values, strict=True))
        return {i: weights[i] for i in sorted(members, key=lambda i: -scores[i])[:k]}

    def attention(self, scope, u, query, keys):
        """One token's attention to the keys, head by head."""
        size, heads = self.cfg.head_dim, []
        for h in range(self.cfg.num_heads):
            kernel = {
                name: scope[name]["kernel"][:, h * size : (h + 1) * size]
                for name in ("query", "key", "value")
            }
            q = u[query] @ kernel["query"]
            weights = softmax([q @ (u[j] @ kernel["key"]) + self.bias(query, j)[h] for j in keys])
            values = [u[j] @ kernel["value"] for j in keys]
            heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
        return np.concatenate(heads) @ scope["out"]["kernel"]

    def bias(self, query, key):
        """Of each head."""
        buckets, limit = self.cfg.relpos_num_buckets, self.cfg.relpos_max_distance
        bucket = relative_position_bucket(np.array(key - query), True, buckets, limit)
        return self.encoder["relpos_bias"]["rel_embedding"][:, bucket]


def norm(x, scope):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scope["scale"]


def mlp(scope, x):
    hidden = gelu(x @ scope["wi_0"]["kernel"]) * (x @ scope["wi_1"]["kernel"])
    return hidden @ scope["wo"]["kernel"]


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
    expected = NumpyEncoder(cfg, params)(tokens, segment_ids)
    inside = segment_ids > 0
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)
