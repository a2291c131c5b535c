"""An exported program gives the tokens that the model gives."""

from contract.programs import LENGTHS, inputs_of, params
from contract.table import each_case
import jax
import numpy as np

from coda_jax import methods, trees
from coda_jax.commands.export import export, program_name
from coda_jax.commands.loading import LoadedModel
from coda_jax.inference import Decoding
from coda_jax.objectives import model_for


@each_case("export")
def test_an_exported_program_gives_the_models_tokens(case, tmp_path):
    """What can be merged is; the program takes the weights in the order of their paths."""
    config, inputs = case.config, inputs_of(case.config)
    size, length = inputs.shape[:2]
    decoding = Decoding(max_input_length=length, max_decode_length=3, batch_size=size)
    export(LoadedModel(config, params(config), None), str(tmp_path), decoding)
    file = tmp_path / program_name(size, length)
    program = jax.export.deserialize(file.read_bytes())
    _, merged = methods.merge(config, params(config))
    found = program.call([leaf for _, leaf in trees.flatten(merged).items()], inputs)

    @jax.jit
    def predict(params, inputs):
        return model_for(config).predict(params, inputs, max_decode_length=3)

    assert found.shape == (len(LENGTHS), 3)
    np.testing.assert_array_equal(found, predict(params(config), inputs))
