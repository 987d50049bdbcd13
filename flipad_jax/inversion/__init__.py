"""From an image back to the activation before the last layer of its generator.

Read in this order: `linops` (the last layer as a linear operator), `prox` (the lasso objective and
its certificate), `fista` (a solver for one image), `lasso` (many images), `final_layer` (images in,
activations out).
"""
