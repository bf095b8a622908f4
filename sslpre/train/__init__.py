"""From a recipe and a folder of images to a trained encoder in a run directory."""
