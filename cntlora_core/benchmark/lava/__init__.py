"""The LAVA paper's claims, tried on what two cores can carry."""
