"""Self-distillation: a routed student follows the dense model that it is made of.

The teacher is the same frozen checkpoint at r = 1, with an adapter of its own or without one:

    loss = (1 - w) task + w sum T^2 KL(softmax(teacher / T) || softmax(student / T)),

the sum over all target tokens of a batch, or over all frames of a CTC head. Both terms are sums,
and their gradient is divided by the number of target tokens, so of a CTC head the teacher's share
grows with the frames of a token.

What the student leaves frozen is in memory once: the teacher reads it there, and brings only the
leaves that the student trains.

Reference: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from coda_jax import checks, methods, trees
from coda_jax.checkpoints.config_json import to_json
from coda_jax.checkpoints.fingerprints import fingerprints
from coda_jax.models import param_axes
from coda_jax.objectives import Model, Sums
from coda_jax.profiling import flops
from coda_jax.sharding import Placement

Loss = Callable[[Mapping, Mapping, Array | None, Mapping], tuple[Float[Array, ""], Sums]]


def divergence(
    teacher: Float[Array, "*b v"], student: Float[Array, "*b v"], temperature: float = 1.0
) -> Float[Array, "*b"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), in float32.

    Args:
        teacher: [..., V] logits.
        student: [..., V] logits.
        temperature: T.
    """
    teacher, student = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        for logits in (teacher, student)
    )
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A teacher, and how much it counts.

    Attributes:
        teacher: the dense model, for the student's objective.
        params: its whole parameter tree.
        weight: w, above 0 and at most 1. At 1 no targets are needed where the logits do not depend
            on them, as those of a CTC head.
        temperature: T.

    Raises:
        ValueError: a value is out of its range, or the objective has no distributions to compare.
    """

    teacher: Model
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    weight: float
    temperature: float = 1.0

    def __post_init__(self):
        checks.fields(
            self, weight=checks.Number(above=0, most=1), temperature=checks.Number(above=0)
        )
        if type(self.teacher).logit_weights is Model.logit_weights:
            self.teacher.logit_weights({})

    def reads_targets(self, model: Model) -> bool:
        """Whether a student's loss reads a batch's targets."""
        return model.reads_targets and (self.weight < 1 or model.logits_read_targets)

    def own_leaves(self, frozen: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
        """The leaves that are not the student's frozen ones, on the devices.

        Args:
            frozen: of the student, on the host.
            placement: the devices.

        Raises:
            ValueError: the teacher has another base: leaves differ from the student's.
        """
        shared, theirs = trees.flatten(frozen), trees.flatten(self.params)
        adapted = methods.trained(self.teacher.config)
        both = {x for x in shared.keys() & theirs.keys() if not trees.matches(x, adapted)}
        different = (  # most are the same arrays, which need not be read
            path
            for path in both
            if shared[path] is not theirs[path] and not np.array_equal(shared[path], theirs[path])
        )
        other = sorted(different)
        if other:
            raise ValueError(
                f"the teacher has another base than the student: {len(other)} of {len(both)} "
                f"frozen leaves differ, {other[0]} for one"
            )
        own = trees.unflatten({path: x for path, x in theirs.items() if path not in both})
        return placement.params(own, param_axes(self.teacher.config))

    def cost(self, model: Model, batch: Mapping[str, np.ndarray]) -> str:
        """One line: what the teacher's pass adds to the student's.

        Args:
            model: the student.
            batch: the first one.
        """
        rows, length = batch["encoder_input_tokens"].shape[:2]
        targets = batch["decoder_target_tokens"].shape[1]
        theirs, ours = (
            flops.answer_flops(x.config, rows, length, targets) for x in (self.teacher, model)
        )
        return (
            f"teacher: its pass over a batch takes {theirs / 1e9:.3g} GFLOP, the student's "
            f"{ours / 1e9:.3g}, and about twice as much for the gradient"
        )

    def loss_of(self, model: Model) -> Loss:
        """The student's loss, (params, batch, rng, the teacher's own leaves) -> (sum, sums).

        Where no targets are read, the sums' weight is that of the logits, and nothing is right.

        Args:
            model: the student.
        """

        reads_targets = self.reads_targets(model)

        def loss(params, batch, rng, own):
            theirs = trees.unflatten({**trees.flatten(params), **trees.flatten(own)})
            weights = model.logit_weights(batch)
            student = model.logits(params, batch, rng)
            teacher = lax.stop_gradient(self.teacher.logits(theirs, batch))
            total = (divergence(teacher, student, self.temperature) * weights).sum()
            task, sums = model.loss_of(student, batch)
            if reads_targets:
                task = (1 - self.weight) * task if self.weight < 1 else 0.0
                sums = sums.replace(loss=task + self.weight * total)
            else:
                nothing = jnp.zeros_like(total)
                sums = Sums(total, weights.sum(), nothing, nothing, sums.examples)
            return sums.loss, sums

        return loss

    def described(self) -> dict[str, Any]:
        """What of it decides a run's result, as JSON: contents, not paths."""
        return {
            "weight": self.weight,
            "temperature": self.temperature,
            "teacher": to_json(self.teacher.config),
            "leaves": fingerprints(self.params),
        }
