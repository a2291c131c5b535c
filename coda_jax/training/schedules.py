"""Learning rates over a run."""

import optax


def warmup_cosine(peak_value: float, total_steps: int, warmup_steps: int = 20) -> optax.Schedule:
    """Linearly from 0 to a peak, then along a cosine to 0 at the end of the run.

    Args:
        peak_value: the greatest rate.
        total_steps: of the run.
        warmup_steps: up to the peak; at most a quarter of the run.
    """
    warmup_steps = min(warmup_steps, total_steps // 4)
    return optax.warmup_cosine_decay_schedule(0.0, peak_value, warmup_steps, total_steps)
