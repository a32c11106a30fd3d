"""Tasks to try a start on: data, a model and a short training."""
