"""What CoDA gains on TPUs of the operations that it leaves out: `make test-tpu`.

By the TPU compiler's own estimates, for one chip, in ratios. The models have two layers of each
kind, beside which embedding and last norm count more than beside twelve: the bars are lower.
"""

import jax.numpy as jnp
import pytest

from coda_jax.commands import bench_topology
from coda_jax.models import preset

libtpu = pytest.importorskip("libtpu")
TWO = {"num_encoder_layers": 2, "num_decoder_layers": 2}


def measured(name, measures, reductions, **sizes):
    """The report for a preset in bfloat16 on one chip of v5e."""
    dense = preset(name, dtype=jnp.bfloat16, dropout_rate=0.0)
    changes = TWO if dense.num_decoder_layers else {"num_encoder_layers": 2}
    return bench_topology.measure(
        dense.replace(**changes),
        "v5e:2x2",
        measures=measures,
        reductions=reductions,
        attentions=("k_to_k",),
        target_length=16,
        **sizes,
    )


@pytest.mark.parametrize(
    ("preset_name", "batch_size", "input_length", "bars"),
    [
        ("t5_1_1_base", 32, 512, {3: 0.75, 4: 0.75}),
        ("t5_1_1_base", 8, 512, {3: 0.55, 4: 0.5}),
        ("pix2struct_base", 4, 4096, {8: 0.65}),
        ("w2v_bert_large", 8, 1500, {2: 0.8, 4: 0.8}),
    ],
)
def test_the_encoder_gets_most_of_what_it_leaves_out(preset_name, batch_size, input_length, bars):
    sizes = {"batch_size": batch_size, "input_length": input_length}
    report = measured(preset_name, ["encoder"], tuple(bars), **sizes)
    for reduction, bar in bars.items():
        row = report["encoder"][f"CoDA r = {reduction}, k_to_k"]
        assert row["fraction_of_bound"] > bar
        assert row["guessed"] < 0.1 or "pix" in preset_name
        assert not row["unknown_loops"]


def test_whole_answers_gain_and_a_decoding_step_takes_what_its_bytes_do():
    report = measured("t5_1_1_base", ["end_to_end"], (4,), batch_size=32, input_length=512)
    row = report["end_to_end"]["CoDA r = 4, k_to_k"]
    assert row["speed_up"] > 1.8
    assert row["step"]["cycles"] < row["step"]["bytes_cycles"]
    assert row["guessed"] < 0.1
