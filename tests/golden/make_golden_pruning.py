"""Makes outputs of the library structured-pruning-adapters for random weights and masks.

Run `python tests/golden/make_golden_pruning.py` from the repository root, with torch and
structured-pruning-adapters 0.7.1 installed, to make pruning.npz again.
"""

from pathlib import Path

import numpy as np
from sp_adapters.splopa import SPLoPALinear
from sp_adapters.splora import SPLoRALinear
from sp_adapters.sppara import SPPaRAConv1d
import torch

FILE = Path(__file__).parent / "pruning.npz"
INPUTS, OUTPUTS, RANK, BLOCK, PROTOTYPES, WIDTH = 12, 8, 3, 4, 5, 7


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers."""
    return tensor.detach().numpy()


def main() -> None:
    """Makes the golden file."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, INPUTS)
    input_mask, output_mask = (torch.rand(size) < 0.6 for size in (INPUTS, OUTPUTS))
    low_rank = SPLoRALinear(INPUTS, OUTPUTS, rank=RANK, init_range=1.0).eval()
    blocks = SPLoPALinear(
        INPUTS, OUTPUTS, num_prototypes=PROTOTYPES, block_shape=(BLOCK, BLOCK), prototype_rank=2,
        init_range=1.0,
    ).eval()  # fmt: skip
    block_mask = torch.rand(OUTPUTS // BLOCK, INPUTS // BLOCK) < 0.6
    masked = blocks.adapted_weight * torch.kron(block_mask, torch.ones(BLOCK, BLOCK))
    convolution = SPPaRAConv1d(
        INPUTS, INPUTS, WIDTH, groups=INPUTS, bias=False, init_range=1.0
    ).eval()  # fmt: skip
    # As the Conformer's: a frame sees those before it.
    before = torch.nn.functional.pad(x.transpose(1, 2), (WIDTH - 1, 0))
    np.savez_compressed(
        FILE,
        x=array(x),
        input_mask=array(input_mask),
        output_mask=array(output_mask),
        splora_kernel=array(low_rank.weight.T),
        splora_bias=array(low_rank.bias),
        splora_rows=array(low_rank.adapter.rows[0].T),
        splora_columns=array(low_rank.adapter.cols[0].T),
        splora=array(low_rank(x * input_mask) * output_mask),
        splopa_kernel=array(blocks.weight.T),
        splopa_bias=array(blocks.bias),
        splopa_prototypes=array(blocks.adapter.prototypes().transpose(1, 2)),
        splopa_prototype_rows=array(blocks.adapter.prototypes.cols.transpose(1, 2)),
        splopa_prototype_columns=array(blocks.adapter.prototypes.rows.transpose(1, 2)),
        splopa_weights=array(blocks.adapter.pos_weights.transpose(1, 2)),
        splopa_mask=array(block_mask.T),
        splopa=array(torch.nn.functional.linear(x, masked, blocks.bias)),
        sppara_kernel=array(convolution.weight[:, 0].T),
        sppara_tap=array(convolution.adapter[:, 0]),
        sppara=array(convolution(before).transpose(1, 2)),
    )


if __name__ == "__main__":
    main()
