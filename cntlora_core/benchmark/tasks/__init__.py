"""Which initialisation helps, on tasks that are no image generation."""
