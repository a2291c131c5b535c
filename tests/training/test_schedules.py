"""Learning rates over a run."""

import numpy as np
import optax
import pytest

from coda_jax.training.schedules import of_run, warmup_cosine


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


def test_without_steps_it_takes_those_of_its_run():
    given = {"warmup_steps": 3, "end_value": 0.5}
    rates = [
        [float(schedule(step)) for step in range(41)]
        for schedule in (of_run(warmup_cosine(2.0, **given), 40), warmup_cosine(2.0, 40, **given))
    ]
    assert rates[0] == rates[1] and rates[0][-1] == 0.5
    assert of_run(0.1, 40) == 0.1
