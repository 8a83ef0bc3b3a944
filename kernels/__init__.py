"""How a model is computed fast: `optimize.optimize_` swaps these layers, attention and blocks into a plain model."""
