"""Views of images, made on the device; every random number is a function of (seed, epoch, index, name)."""
