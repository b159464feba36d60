"""Pure mathematics on tensors: what every system of the package looks at a network through."""
