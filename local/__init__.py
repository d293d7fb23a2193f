"""The parts of the recipe: data, model, training, separation and scoring."""
