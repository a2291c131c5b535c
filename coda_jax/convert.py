"""`coda convert`: checkpoints from one layout to another, and the adapter file out of any of them.

What is converted is known by what its folder holds:
- `config.json`: a dense Hugging Face checkpoint;
- `adapter.json`: an adapter file, together with its base;
- `run.json`: a run of `coda train`, together with its base where only adapters were trained;
- a T5X checkpoint, or a run's folder of them. The config is not part of it: sizes are read off the
  shapes, and what adapters and routers do has to be said.

The step goes along, the optimizer's state does not: a run goes on in the other trainer from its
parameters, with a fresh optimizer.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from coda_jax import checkpoints
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.batches import VOCABULARY_NAME
from coda_jax.checkpoints import files
from coda_jax.checkpoints.adapter_files import MANIFEST, fingerprint
from coda_jax.checkpoints.shapes import config_class, expected_shapes
from coda_jax.checkpoints.stored_arrays import list_orbax, read_arrays
from coda_jax.checkpoints.t5x_files import is_t5x, read_t5x
from coda_jax.network import T5Config
from coda_jax.routing import CodaConfig
from coda_jax.run_files import CHECKPOINTS, RUN_FILE

CONFIG_FILE = "config.json"
HEAD = "decoder/logits_dense/kernel"  # of all T5 but 1.0
T5X_BUCKETS = 32
TELLING = {  # matrices from whose shapes the sizes are read
    "embedding": "token_embedder/embedding",
    "bias": "encoder/relpos_bias/rel_embedding",
    "query": "encoder/layers_0/attention/query/kernel",
    "mlp": "encoder/layers_0/mlp/wo/kernel",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        config: of the model.
        params: its whole parameter tree.
        step: the training step, 0 where none is known.
    """

    config: T5Config
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    step: int = 0


def convert(
    source: str,
    output: str,
    layout: str,
    *,
    base: str | None = None,
    config: T5Config | None = None,
    adapter: AdapterConfig | None = None,
    coda: CodaConfig | None = None,
    step: int | None = None,
) -> None:
    """Writes a checkpoint in another layout.

    Args:
        source: folder of what is converted; see the module.
        output: folder to write. In layout "hf" it gets the dense checkpoint, and in its folder
            `adapter` the adapter file, if there are adapters or routers; in layout "t5x" an orbax
            checkpoint `checkpoint_<step>` with them under `target`, named as here; in layout
            "adapter" the adapter file alone. A vocabulary beside the source, or beside the base,
            is copied beside a checkpoint.
        layout: "hf", "t5x" or "adapter".
        base: folder of the dense checkpoint, in Hugging Face layout or of T5X, that `source` was
            trained from. A source that holds only what was trained needs it. Given with a T5X
            checkpoint, the frozen leaves have to be the base's, and get its dtype again.
        config: sizes, for a T5X checkpoint; None to read them off its shapes, with what T5X's own
            network fixes: gated layers use GELU, and relative positions end at 128.
        adapter: the adapter, for a T5X checkpoint that has one.
        coda: the routing, for a T5X checkpoint that routes.
        step: takes the checkpoint of that step from a run; None for the newest.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or files of it are missing.
        ValueError: if an argument is unknown, missing or not used by such a source; if leaves are
            missing, extra, misshapen or damaged (all are listed); if the base is another one.
    """
    if layout not in WRITERS:
        raise ValueError(f"layout={layout!r} is unknown; it must be one of {[*WRITERS]}.")
    options = {"base": base, "config": config, "adapter": adapter, "coda": coda, "step": step}
    read = _read(Path(source), {name: x for name, x in options.items() if x is not None})
    WRITERS[layout](Path(output), read)
    if layout != "adapter":
        _copy_vocabulary([Path(name) for name in (source, base) if name], Path(output))
    count = params_lib.count(read.params)
    print(f"{source}, step {read.step}, {count:,} parameters, is now in {output} ({layout})")


def infer_config(params: Mapping) -> T5Config:
    """Returns the dense config of a T5's parameters, as far as their shapes tell it.

    Raises:
        ValueError: if leaves that tell a size are missing, or they look like no known T5.
    """
    flat = params_lib.flatten(params)
    shapes = {name: getattr(flat.get(path), "shape", ()) for name, path in TELLING.items()}
    missing = [TELLING[name] for name, shape in shapes.items() if len(shape) != 2]
    if missing:
        raise ValueError(f"These parameters are not a T5's, they lack the matrices {missing}.")
    gated, tied = "encoder/layers_0/mlp/wi_0/kernel" in flat, HEAD not in flat
    if gated == tied:
        raise ValueError(
            f"These parameters are neither T5 1.0's nor a later T5's: with {gated=}, {HEAD} must "
            f"be {'there' if gated else 'missing'}. If that is so, give the config."
        )
    layers = {stack: {path.split("/")[1] for path in flat if path.startswith(f"{stack}/layers_")}
              for stack in ("encoder", "decoder")}  # fmt: skip
    vocab_size, emb_dim = shapes["embedding"]
    num_heads, num_buckets = shapes["bias"]
    if num_buckets != T5X_BUCKETS:
        raise ValueError(
            f"A relative position bias with {num_buckets} buckets is not of T5X's own network, "
            f"which has {T5X_BUCKETS}, and does not tell the largest distance. Give the config."
        )
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=len(layers["encoder"]),
        num_decoder_layers=len(layers["decoder"]),
        head_dim=shapes["query"][1] // num_heads,
        mlp_dim=shapes["mlp"][0],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding=tied,
    )


def _read(folder: Path, options: Mapping[str, Any]) -> Source:
    """Reads what a folder holds; raises ValueError for options that mean nothing for it."""
    found = [kind for file, kind in KINDS.items() if (folder / file).is_file()]
    if is_t5x(folder):
        found.append(("a T5X checkpoint", _read_t5x, ("base", "config", "adapter", "coda", "step")))
    if not found:
        raise FileNotFoundError(f"{folder} is no T5X checkpoint and has none of {[*KINDS]}.")
    if len(found) > 1:
        raise ValueError(f"{folder} is several things at once: {[kind[0] for kind in found]}")
    name, reader, allowed = found[0]
    unused = sorted(options.keys() - set(allowed))
    if unused:
        raise ValueError(f"{folder} is {name}, for which {unused} cannot be given.")
    return reader(folder, **options)


def _read_hf(folder: Path) -> Source:
    return Source(*checkpoints.load_hf(folder))


def _read_adapter(folder: Path, base: str | None = None) -> Source:
    return Source(*checkpoints.load_adapter(folder, _load_base(base, folder)))


def _load_base(base: str | None, source: Path) -> dict:
    """Returns the parameters of a dense checkpoint."""
    if base is None:
        raise ValueError(f"{source} holds only what was trained: give the base that it belongs to.")
    if (Path(base) / CONFIG_FILE).is_file():
        return checkpoints.load_hf(base)[1]
    return checkpoints.load_t5x(base)


def _read_run(folder: Path, base: str | None = None, step: int | None = None) -> Source:
    """Reads a checkpoint of `coda train`: the trained leaves, and with adapters those of the base.

    The optimizer's state is not read.
    """
    run = files.read_json(folder / RUN_FILE)
    config, trained = _parse_model(run, folder), run["trained"]
    steps = sorted(int(path.name) for path in (folder / CHECKPOINTS).glob("[0-9]*"))
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(f"{folder} has no checkpoint of {step=}. Steps found: {steps}")
    step = steps[-1] if step is None else step
    item = folder / CHECKPOINTS / str(step) / "state"
    stored = {path.removeprefix("trained/"): array for path, array in list_orbax(item).items()
              if path.startswith("trained/")}  # fmt: skip
    params = params_lib.unflatten(read_arrays(stored, item))
    _, params = params_lib.split(params, params_lib.PRETRAINING)
    if trained != "all":
        base_params = _load_base(base, folder)
        if (found := fingerprint(base_params)) != run["base"]:
            raise ValueError(
                f"{folder} was trained from the base with fingerprint {run['base']}; {base} has "
                f"{found}."
            )
        params = params_lib.merge(params_lib.partition(base_params, trained)[1], params)
    elif base is not None:
        raise ValueError(f"{folder} holds all leaves (trained='all'): base={base!r} is not used.")
    params_lib.check_tree(expected_shapes(config), params, what=f"The leaves of {item} do")
    return Source(config, params, step)


def _parse_model(run: Mapping[str, Any], folder: Path) -> T5Config:
    """Returns the config of the model in a run.json."""
    try:
        model = dict(run["model"])
        cls = config_class(model.pop("family"), folder / RUN_FILE)
        model["dtype"] = jnp.dtype(model["dtype"]).type
        model["mlp_activations"] = tuple(model["mlp_activations"])
        for name, part in (("adapter", AdapterConfig), ("coda", CodaConfig)):
            model[name] = model[name] and part(**model[name])
        return cls(**model)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RUN_FILE} does not describe a model: {error}") from error


def _read_t5x(
    folder: Path,
    base: str | None = None,
    config: T5Config | None = None,
    adapter: AdapterConfig | None = None,
    coda: CodaConfig | None = None,
    step: int | None = None,
) -> Source:
    params, step = read_t5x(folder, step)
    if config is None:
        config = infer_config(params)
        print(f"config, from the shapes of {folder}: {config}")
    config = config.replace(adapter=adapter or config.adapter, coda=coda or config.coda)
    _, new = params_lib.split_new(params)
    if new and config == config.dense():
        raise ValueError(
            f"{folder} has adapters or routers, and does not say what they do: give the adapter "
            "and the routing, as the file of the method says them (methods/coda.gin, after "
            "runs/convert.gin)."
        )
    params_lib.check_tree(expected_shapes(config), params, what=f"The leaves of {folder} do")
    if base is not None:
        params = _onto_base(params, _load_base(base, folder), folder)
    return Source(config, params, step)


def _onto_base(params: Mapping, base_params: Mapping, folder: Path) -> dict:
    """Puts the trained leaves onto the base, whose values the frozen leaves must have."""
    saved, frozen = params_lib.split(params, params_lib.SAVED)
    _, base = params_lib.split(base_params, params_lib.SAVED)
    params_lib.check_tree(base, frozen, what=f"The frozen leaves of {folder} do")
    theirs, ours = params_lib.flatten(base), params_lib.flatten(frozen)
    changed = [path for path, leaf in theirs.items() if not _same_values(leaf, ours[path])]
    if changed:
        raise ValueError(
            f"{folder} was not trained from this base, these leaves differ:\n  "
            + "\n  ".join(changed)
        )
    return params_lib.merge(base, saved)


def _same_values(first: np.ndarray, second: np.ndarray) -> bool:
    # float64 holds every value of the dtypes that a base may have.
    return np.array_equal(first.astype(np.float64), second.astype(np.float64))


def _write_hf(output: Path, read: Source) -> None:
    dense, _ = params_lib.split_new(read.params)
    checkpoints.save_hf(output, read.config.dense(), dense)
    if read.config != read.config.dense():
        _write_adapter(output / "adapter", read)


def _write_t5x(output: Path, read: Source) -> None:
    checkpoints.save_t5x(output, read.params, read.step)


def _write_adapter(output: Path, read: Source) -> None:
    checkpoints.save_adapter(output, read.params, read.config)


def _copy_vocabulary(folders: list[Path], output: Path) -> None:
    """Puts the vocabulary of the first folder that has one beside the new checkpoint."""
    found = [path for folder in folders if (path := folder / VOCABULARY_NAME).is_file()]
    if found and found[0].resolve() != (output / VOCABULARY_NAME).resolve():
        shutil.copy(found[0], output)


WRITERS = {"hf": _write_hf, "t5x": _write_t5x, "adapter": _write_adapter}
KINDS = {  # by the file that tells: what a folder is, what reads it, the options that it takes
    CONFIG_FILE: ("a Hugging Face checkpoint", _read_hf, ()),
    MANIFEST: ("an adapter file", _read_adapter, ("base",)),
    RUN_FILE: ("a run of coda train", _read_run, ("base", "step")),
}
