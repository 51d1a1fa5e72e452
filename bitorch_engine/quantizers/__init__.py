"""How a float becomes a code: weights, activations, gradients, and whatever autograd saves."""
