"""Which initialisation helps, by how much, at what price: many trainings, measured alike."""
