"""Learning rates over a run."""

import numpy as np
import optax
import pytest

from coda_jax.training.schedules import warmup_cosine


@pytest.mark.parametrize("total", [1, 3, 5, 40, 1000])
def test_any_number_of_steps_warms_up_and_ends_at_0(total):
    rates = np.array([warmup_cosine(2.0, total)(step) for step in range(total + 1)])
    warmup = min(20, total // 4)
    assert rates.argmax() == warmup and rates.max() == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(rates[warmup:]) < 0).all() and (np.diff(rates[: warmup + 1]) > 0).all()
    if total >= 80:
        theirs = optax.warmup_cosine_decay_schedule(0.0, 2.0, 20, total)
        np.testing.assert_array_equal(rates, [theirs(step) for step in range(total + 1)])
