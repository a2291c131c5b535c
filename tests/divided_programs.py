"""Programs of a tiny model on eight devices, and on one; a program that prints what differs."""

import contextlib
import json
import re

from flax.linen import partitioning
from helpers import as_on_tpu, config, random_params
import jax
import numpy as np

from coda_jax import trees
from coda_jax.commands.bench_programs import Programs, random_batch
from coda_jax.models import param_axes
from coda_jax.sharding import AXIS_RULES, Placement, num_parts

MESH = {"data": 4, "model": 2}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = rf"= (\S.*?) ({KINDS})(?:-start)?\(.*op_name=\"([^\"]*)\""
PROGRAMS = {"default": ("encoder",), "tpu": ("encoder", "beams", "train_step")}


def collectives(text):
    """[kind, shapes, scope] of what the devices exchange, each once."""
    found = {(kind, shape, scope) for shape, kind, scope in re.findall(COLLECTIVE, text)}
    return sorted(found)


def measured(cfg, name):
    """What a program exchanges and what it gives, divided and not."""
    batch = random_batch(cfg, 8, 12, 4)
    function, arguments = getattr(Programs(cfg, random_params(cfg), batch), name)()
    pod = Placement(MESH)
    *held, rows = arguments
    shapes = (*pod.shapes(held, param_axes(cfg)), pod.rows(rows))
    placed = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), arguments, shapes)
    # Functions of their own: one program must not be taken for the other.
    jitted = function if hasattr(function, "lower") else jax.jit(lambda *x: function(*x))
    with pod.divided():
        compiled = jitted.lower(*shapes).compile()
    one = jax.tree.leaves(jax.jit(lambda *x: function(*x))(*jax.tree.map(np.asarray, arguments)))
    divided = jax.tree_util.tree_leaves_with_path(compiled(*placed))
    return {
        "collectives": collectives(compiled.as_text()),
        "difference": max(
            float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(1, np.max(np.abs(b))))
            for (_, a), b in zip(divided, one, strict=True)
        ),
        "shards": {
            jax.tree_util.keystr(path): [leaf.shape, leaf.addressable_shards[0].data.shape]
            for path, leaf in divided
        },
    }


def parts_of_heads():
    """[of 2 heads, of 3] without a mesh, with ours, and with one as T5X has it."""
    pod = Placement(MESH)

    def parts():
        return [num_parts("heads", size) for size in (2, 3)]

    found = {"none": parts()}
    with pod.divided():
        found["ours"] = parts()
    with pod.mesh, partitioning.axis_rules(AXIS_RULES):
        found["t5x"] = parts()
    return found


def main():
    """Prints {formulations: {program: what it exchanges and gives}}."""
    cfg = config(coda={"reduction": 2.0}, vocab_size=64, num_encoder_layers=1)
    report = {"parts": parts_of_heads()}
    for branch, names in PROGRAMS.items():
        with as_on_tpu() if branch == "tpu" else contextlib.nullcontext():
            report[branch] = {name: measured(cfg, name) for name in names}
    held = Placement(MESH).shapes(random_params(cfg), param_axes(cfg))
    report["parameters"] = {
        path: [leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
        for path, leaf in trees.flatten(held).items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
