"""Images in: folders, MNIST's files, stored latents, sets of images."""
