"""Tasks to try an initialisation on: data, a model and a short training."""
