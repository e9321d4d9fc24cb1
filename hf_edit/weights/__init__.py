"""What editors of weights share: value optimisation, insertion, and changes kept beside the weights."""
