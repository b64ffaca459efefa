"""How far the training output of batch normalization in float32 is from float64, at a large mean: ours and torch's.

python docs/accuracy.py     prints the table of docs/numerics.md
"""

import platform

import torch

import batchnorm as bn

SHAPES = {
    "(32, 64, 56, 56)": ((32, 64, 56, 56), torch.contiguous_format),
    "(32, 64, 56, 56) channels-last": ((32, 64, 56, 56), torch.channels_last),
    "(32, 512, 14, 14)": ((32, 512, 14, 14), torch.contiguous_format),
    "(32, 512, 14, 14) channels-last": ((32, 512, 14, 14), torch.channels_last),
    "(256, 1024)": ((256, 1024), torch.contiguous_format),
}


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| input, mean 1e4, standard deviation 1 | batchnorm | torch |\n|---|--:|--:|")
    for name, (shape, layout) in SHAPES.items():
        x = (torch.randn(shape) + 1e4).contiguous(memory_format=layout)
        exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
        ours, theirs = (
            (function(x, None, None, training=True) - exact).abs().max().item()
            for function in (bn.batch_norm, torch.nn.functional.batch_norm)
        )
        print(f"| {name} | {ours:.0e} | {theirs:.0e} |")


if __name__ == "__main__":
    main()
